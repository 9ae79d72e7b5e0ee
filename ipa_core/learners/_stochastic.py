"""Base class of the stochastic-approximation rules, which step after every micro-batch."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Self

from ipa_core._array import Array, Namespace
from ipa_core._linalg import pad_rows, principal_rows, truncate_rows
from ipa_core.learners._row_blocks import Rows
from ipa_core.learners.base import Learner


class StochasticRule(Learner):
    """Learner that moves its directions by a step after every micro-batch of 256 rows.

    The state converts to a factor F, with F^T F the estimated second moment, and back: two learners
    merge through their factors.
    """

    _numbers: ClassVar[tuple[str, ...]] = (*Learner._numbers, "_rows_stepped", "_unit")
    _arrays: ClassVar[tuple[str, ...]] = (*Learner._arrays, "_directions")
    _block_rows = 256

    #: Numerator c and delay of the step min(1, c / (t + c - 1)) after t micro-batches.
    _step_numerator: ClassVar[float]

    def __init__(self, rank: int, *, center: bool = False, seed: int = 0) -> None:
        super().__init__(rank, center=center, seed=seed)
        self._directions: Array = None
        self._rows_stepped = 0
        self._unit = 1.0  # energies are stored in units of its square

    @property
    @abstractmethod
    def _width(self) -> int:
        """Number of directions in the state."""

    @abstractmethod
    def _step(self, xp: Namespace, rows: Rows, weight: float, size: float) -> None:
        """Move the directions towards the leading ones of ``rows``, of total ``weight``."""

    @abstractmethod
    def _to_factor(self, xp: Namespace) -> Array:
        """Return F, with F^T F the estimated second moment of all rows."""

    @abstractmethod
    def _from_factor(self, xp: Namespace, factor: Array, weight: float) -> None:
        """Set the state from a factor of ``_width`` orthogonal rows, of total ``weight``."""

    def _absorb_rows(self, xp: Namespace, rows: Rows) -> None:
        self._rows_stepped += rows.count
        weight = rows.total_weight()
        if self._directions is None:
            self._start(xp, rows, weight)
        else:
            self._step(xp, rows, weight, self._step_size(weight))

    def _step_size(self, weight: float) -> float:
        """Return c / (t + c - 1), with t counted in micro-batches of the usual weight."""
        numerator = self._step_numerator
        usual = self._weight * self._block_rows / self._rows_stepped
        return min(1.0, numerator * weight / (self._weight + (numerator - 1) * usual))

    def _start(self, xp: Namespace, rows: Rows, weight: float) -> None:
        """Start from the leading directions of the first rows.

        A random start can be nearly orthogonal to a direction, which then grows too slowly where
        the next eigenvalue is close.
        """
        self._unit = rows.unit()
        factor = truncate_rows(xp, [rows.sqrt_weighted(xp)], self._width)
        self._from_factor(xp, pad_rows(xp, factor, self._width), weight)

    def _absorb_shift(self, xp: Namespace, shift: Rows) -> None:
        self._stack(xp, shift.x, self._weight)

    def _absorb_summary(self, xp: Namespace, other: Self) -> None:
        self._rows_stepped += other._rows_stepped
        self._stack(xp, other._to_factor(xp), self._weight + other._weight)

    def _stack(self, xp: Namespace, rows: Array, weight: float) -> None:
        pieces = [self._to_factor(xp), rows]
        self._from_factor(xp, truncate_rows(xp, pieces, self._width), weight)

    def _solve(self, xp: Namespace) -> tuple[Array, Array]:
        return principal_rows(xp, [self._to_factor(xp)], self.rank)
