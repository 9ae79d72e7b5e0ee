"""Generalized Hebbian rule with a scale-invariant step."""

from __future__ import annotations

from typing import ClassVar

from ipa_core import _array
from ipa_core._array import Array, Namespace
from ipa_core._linalg import inverse_root
from ipa_core.learners._row_blocks import Rows
from ipa_core.learners._stochastic import StochasticRule
from ipa_core.learners.guarantee import Guarantee


class HebbianRule(StochasticRule):
    r"""Sanger's rule; the length of a direction is its eigenvalue.

    With U the rows of V orthonormalized in order, and Z = X U^T for a micro-batch X of n rows,

    .. math:: V \leftarrow (1 - a) V + \frac{a}{n}
              \left(Z^\top X - \operatorname{tril}_{-1}(Z^\top Z)\, U\right), \qquad
              a_t = \min\left(1, \frac{5}{t + 4}\right).

    The step is a / eigenvalue by construction, so that the result does not depend on the scale of
    the data; with a fixed step the rule stalls at small scales and diverges at large ones.

    Guarantee: statistical, on streams that do not drift. Time O(4 r d) for a row, memory O(r d).

    Notes
    -----
    This learner needs the least memory and is the least accurate: expect an excess error of 1e-3 to
    1e-2 after some 50,000 rows, and 0.2 on a sorted stream. `RandomizedSVD` takes about the same
    time. Sanger's rule makes the rows orthogonal only in the limit; orthonormalizing them in every
    step costs O(r^2 d) for 256 rows and reduces the excess on steep spectra from 0.1 to 1e-3.

    References
    ----------
    Sanger, "Optimal unsupervised learning in a single-layer linear feedforward neural network",
    Neural Networks 1989.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import HebbianRule
    >>> x = np.random.default_rng(0).standard_normal((20000, 3)) * [3.0, 2.0, 1.0]
    >>> abs(HebbianRule(rank=2).update(x).finalize().components).round(1)
    array([[1., 0., 0.],
           [0., 1., 0.]])
    """

    guarantee = Guarantee("statistical", 0.1)
    _step_numerator: ClassVar[float] = 5.0

    @property
    def _width(self) -> int:
        return self.rank

    def _step(self, xp: Namespace, rows: Rows, weight: float, size: float) -> None:
        unit = self._normalized(xp)
        codes = rows.x @ (unit.T / self._unit)
        weighted = rows.apply_weights(codes)
        deflation = xp.tril(weighted.T @ codes, k=-1)
        target = (weighted.T @ rows.x / self._unit - deflation @ unit) / weight
        self._directions = (1.0 - size) * self._directions + size * target

    def _normalized(self, xp: Namespace) -> Array:
        """Return the rows orthonormalized in order, signs kept.

        The rule makes them orthogonal only in the limit. A row of rounding noise must be orthogonal
        to the earlier rows, or the deflation would amplify it.
        """
        basis, triangle = xp.linalg.qr(self._directions.T, mode="reduced")
        flips = 1.0 - 2.0 * _array.cast(xp, xp.linalg.diagonal(triangle) < 0, basis.dtype)
        return (basis * flips).T

    def _to_factor(self, xp: Namespace) -> Array:
        """Return the factor: a direction of length l has energy l, its factor row length sqrt(l).

        Rows below rounding become zero: their directions are noise.
        """
        # The rows may be longer than those that the unit was chosen by: squares could overflow.
        longest = float(xp.max(xp.abs(self._directions))) or 1.0
        directions = self._directions / longest
        squares = xp.vecdot(directions, directions)
        noise = xp.max(squares) * float(xp.finfo(squares.dtype).eps) ** 2
        root = xp.sqrt(inverse_root(xp, squares, noise) * (self._weight * longest)) * self._unit
        return directions * root[:, None]

    def _from_factor(self, xp: Namespace, factor: Array, weight: float) -> None:
        rows = factor / self._unit
        lengths = xp.sqrt(xp.vecdot(rows, rows))
        self._directions = rows * (lengths / weight)[:, None]
