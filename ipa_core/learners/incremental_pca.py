"""Incremental PCA with a row buffer and oversampled directions."""

from __future__ import annotations

from typing import ClassVar, Self

from ipa_core._array import Array, Namespace
from ipa_core._linalg import principal_rows, truncate_rows
from ipa_core.learners._row_blocks import Rows
from ipa_core.learners.base import Learner
from ipa_core.learners.guarantee import Guarantee


class IncrementalPCA(Learner):
    r"""Merge-and-truncate PCA: stack the factor and the new rows, keep the leading directions.

    With F the factor (2.5 r rows, :math:`F^\top F \approx \sum_i w_i x_i x_i^\top`) and X the next
    5r rows (at least 64),

    .. math:: F \leftarrow \text{leading } 2.5\,r \text{ rows of } \Lambda^{1/2} V^\top, \qquad
              F^\top F + X^\top W X = V \Lambda V^\top .

    Keeping 2.5 r directions instead of r makes a single pass accurate under drift. The
    decomposition is that of the small Gram matrix in float64.

    Guarantee: bounded. Time O(30 r d) for a row, memory O(15 r d).

    References
    ----------
    Ross, Lim, Lin and Yang, "Incremental learning for robust visual tracking", IJCV 2008.
    Levy and Lindenbaum, "Sequential Karhunen-Loeve basis extraction", 2000.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import IncrementalPCA
    >>> learner = IncrementalPCA(rank=1)
    >>> for row in np.diag([3.0, 2.0, 1.0]):
    ...     learner = learner.update(row)
    >>> abs(learner.finalize().components).round(3)
    array([[1., 0., 0.]])
    """

    guarantee = Guarantee("bounded", 0.05)
    _arrays: ClassVar[tuple[str, ...]] = (*Learner._arrays, "_factor")

    _factor: Array = None

    @property
    def _block_rows(self) -> int:
        # Below 64 rows the call overhead of the decompositions exceeds their arithmetic.
        return max(64, 5 * self.rank)

    def _absorb_rows(self, xp: Namespace, rows: Rows) -> None:
        self._stack(xp, rows.sqrt_weighted(xp))

    def _absorb_summary(self, xp: Namespace, other: Self) -> None:
        self._stack(xp, other._factor)

    def _stack(self, xp: Namespace, rows: Array) -> None:
        pieces = [rows] if self._factor is None else [self._factor, rows]
        self._factor = truncate_rows(xp, pieces, (5 * self.rank + 1) // 2)

    def _solve(self, xp: Namespace) -> tuple[Array, Array]:
        return principal_rows(xp, [self._factor], self.rank)
