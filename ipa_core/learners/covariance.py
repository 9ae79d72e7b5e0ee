"""Exact second moment (or covariance) of the stream, decomposed once at the end."""

from __future__ import annotations

from typing import ClassVar, Self

from ipa_core import _array
from ipa_core._array import Array, Namespace
from ipa_core._linalg import gram, top_eigh
from ipa_core.errors import EmptyStreamError
from ipa_core.learners._row_blocks import Rows
from ipa_core.learners.base import Guarantee, Learner
from ipa_core.projector import Projector


class ExactCovariance(Learner):
    r"""The exact optimum, at the price of a features x features matrix.

    .. math:: C = \sum_i w_i x_i x_i^\top, \qquad P = \text{leading eigenvectors of } C.

    Products, sums and the eigen-decomposition are float64 where the library has it: in float32 a
    mean a thousand times the rest would cost a fifth of the error.

    Guarantee: exact. Time O(n d^2 + d^3), memory 8 d^2 bytes: the cheapest learner up to about 4r
    features (where `RandomizedSVD` does the same), the oracle above.

    References
    ----------
    Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import ExactCovariance
    >>> learner = ExactCovariance(rank=1).update(np.array([[3.0, 0.0], [0.0, 1.0]]))
    >>> abs(learner.finalize().components)
    array([[1., 0.]])
    """

    guarantee = Guarantee("exact", 0.0)
    _arrays: ClassVar[tuple[str, ...]] = (*Learner._arrays, "_moment")
    _block_rows = 2048

    _moment: Array = None

    def residual(self, projector: Projector) -> float:
        """Return the mean of |x - P^T P x|^2 over all rows seen, for any projector's P.

        The rows are taken as they were given (about the mean with ``center=True``).
        """
        xp, seen = self._xp, self._flushed()
        moment = seen._moment
        basis = _array.cast(xp, projector.components, moment.dtype)
        kept = xp.linalg.trace(basis @ moment @ basis.T)
        return max(0.0, float(xp.linalg.trace(moment) - kept)) / seen._weight

    def _absorb_rows(self, xp: Namespace, rows: Rows) -> None:
        self._add(gram(xp, rows.sqrt_weighted(xp).T))

    def _absorb_summary(self, xp: Namespace, other: Self) -> None:
        self._add(other._moment)

    def _add(self, moment: Array) -> None:
        self._moment = moment if self._moment is None else self._moment + moment

    def _solve(self, xp: Namespace) -> tuple[Array, Array]:
        values, vectors = top_eigh(xp, self._moment, self.rank)
        return vectors.T, values

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
        return seen._moment / seen._weight

    @property
    def mean(self) -> Array:
        """Mean of the rows, shape (features,), with ``center=True``; else zeros, as in `Projector`.

        Raises
        ------
        EmptyStreamError
            If no row has been seen.
        """
        seen = self._nonempty()
        return self._xp.zeros_like(seen._moment[0, :]) if seen._mean is None else seen._mean

    def _nonempty(self) -> Self:
        """Return a copy with nothing pending."""
        if self.samples == 0:
            raise EmptyStreamError("expected at least one row of positive weight, got none")
        return self._flushed()
