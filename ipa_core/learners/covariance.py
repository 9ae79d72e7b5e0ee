"""Exact second moment (or covariance) of the stream, decomposed once at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from ipa_core._array import Array, Namespace
from ipa_core._torch_modes import isolated_method
from ipa_core.errors import EmptyStreamError
from ipa_core.learners._row_blocks import Rows
from ipa_core.learners._second_moment import SecondMoment
from ipa_core.learners._validation import match
from ipa_core.learners.base import Learner
from ipa_core.learners.guarantee import Guarantee
from ipa_core.projector import Projector, check_projector


class ExactCovariance(Learner):
    r"""Exact optimum, at the cost of a features x features matrix.

    .. math:: C = \sum_i w_i x_i x_i^\top, \qquad P = \text{leading eigenvectors of } C.

    Rows in float32 have products and sums in float64 where the library has it: in float32 a mean a
    thousand times the rest would cost a fifth of the error. Rows in float64 are folded into a
    triangular root of C by QR decompositions: directions whose lengths differ by a factor of 1e8
    are both kept, which no float64 moment can do.

    Guarantee: exact. Time O(n d^2 + d^3), memory 8 d^2 bytes: the cheapest learner up to about 4r
    features (where `RandomizedSVD` does the same), the oracle above. float64 rows take about three
    times as long.

    References
    ----------
    Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
    Golub and Van Loan, "Matrix Computations", section 6.5 (updating matrix factorizations).

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import ExactCovariance
    >>> learner = ExactCovariance(rank=1).update(np.array([[3.0, 0.0], [0.0, 1.0]]))
    >>> abs(learner.finalize().components)
    array([[1., 0.]])
    """

    guarantee = Guarantee("exact", 0.0)
    _values: ClassVar[Mapping[str, type]] = {"_moment": SecondMoment}
    _block_rows = 2048

    _moment: SecondMoment | None = None

    @isolated_method
    def residual(self, projector: Projector) -> float:
        """Return the mean of |x - P^T P x|^2 over all rows seen, for any projector's P.

        The rows are taken as they were given (about the mean with ``center=True``).

        Raises
        ------
        ArrayTypeError, ShapeError
            If this is no projector, or not one of the features, library and device of the rows.
        """
        components = check_projector(projector).components
        seen = self._flushed()
        if seen._moment is None:
            return 0.0
        match(components, self._template)
        return seen._moment.residual(self._xp, components) / seen._weight

    def _absorb_rows(self, xp: Namespace, rows: Rows) -> None:
        self._add(xp, SecondMoment.of(xp, rows.sqrt_weighted(xp)))

    def _absorb_summary(self, xp: Namespace, other: Self) -> None:
        self._add(xp, other._moment)

    def _add(self, xp: Namespace, moment: SecondMoment | None) -> None:
        if moment is not None:
            self._moment = moment if self._moment is None else self._moment.plus(xp, moment)

    def _solve(self, xp: Namespace) -> tuple[Array, Array]:
        assert self._moment is not None
        return self._moment.principal(xp, self.rank)

    @property
    def moment(self) -> Array:
        r"""Mean of :math:`x x^\top`, shape (features, features), float64 where there is one.

        About the mean with ``center=True`` (the covariance, divided by n), else about the origin.
        It does not depend on the rank.

        Raises
        ------
        EmptyStreamError
            If no row has been seen.
        """
        seen = self._nonempty()
        assert seen._moment is not None
        return seen._moment.matrix() / seen._weight

    @property
    def mean(self) -> Array:
        """Mean of the rows, shape (features,), with ``center=True``; else zeros, as in `Projector`.

        Raises
        ------
        EmptyStreamError
            If no row has been seen.
        """
        seen = self._nonempty()
        if seen._mean is not None:
            return seen._mean
        assert seen._moment is not None
        return self._xp.zeros_like(seen._moment.array[0, :])

    def _nonempty(self) -> Self:
        """Return a copy with nothing pending."""
        if self.samples == 0:
            raise EmptyStreamError(
                "expected at least one row of positive weight, got none; update() the learner first"
            )
        return self._flushed()
