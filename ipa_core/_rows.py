"""A block of activation rows with their weights and squared lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ipa_core._array import Array, Namespace, wide_sum


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows ``x`` (n, features), ``weights`` (n,) or None for ones, ``squares`` |x_i|^2 (n,)."""

    x: Array
    weights: Array | None
    squares: Array

    @property
    def count(self) -> int:
        return int(self.x.shape[0])

    def cut(self, start: int, stop: int) -> Rows:
        """Return rows ``start`` to ``stop`` as views."""
        weights = None if self.weights is None else self.weights[start:stop]
        return Rows(self.x[start:stop, :], weights, self.squares[start:stop])

    def own(self, xp: Namespace) -> Rows:
        """Return a copy that no later change of the caller's array can reach."""
        weights = None if self.weights is None else xp.asarray(self.weights, copy=True)
        return Rows(xp.asarray(self.x, copy=True), weights, self.squares)

    def weigh(self, values: Array) -> Array:
        """Multiply each row of ``values`` (n, ...) by the row's weight."""
        if self.weights is None:
            return values
        return values * (self.weights if values.ndim == 1 else self.weights[:, None])

    def scaled(self, xp: Namespace) -> Array:
        """Return the rows times the roots of their weights: what an unweighted rule may take."""
        return self.x if self.weights is None else self.x * xp.sqrt(self.weights)[:, None]

    def total_weight(self, xp: Namespace) -> float:
        return float(self.count) if self.weights is None else wide_sum(xp, self.weights)

    def energy(self, xp: Namespace) -> float:
        """Return the weighted sum of the squared lengths."""
        return wide_sum(xp, self.weigh(self.squares))

    def unit(self, xp: Namespace) -> float:
        """Return the power of two nearest to the root mean square entry; 1 for all zeros.

        Dividing by it is exact and keeps products of two rows within the range of the dtype.
        """
        mean_square = wide_sum(xp, self.squares) / (self.count * self.x.shape[1])
        return 2.0 ** round(math.log2(mean_square) / 2) if mean_square > 0.0 else 1.0


def join(xp: Namespace, parts: tuple[Rows, ...]) -> Rows:
    """Stack blocks of rows into one."""
    if len(parts) == 1:
        return parts[0]
    weights = None
    if any(part.weights is not None for part in parts):
        weights = xp.concat(
            [xp.ones_like(p.squares) if p.weights is None else p.weights for p in parts]
        )
    return Rows(xp.concat([p.x for p in parts]), weights, xp.concat([p.squares for p in parts]))
