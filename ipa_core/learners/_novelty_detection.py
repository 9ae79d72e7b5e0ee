"""Detection of rows that a basis does not explain: heavy rows, and a change of the stream."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from ipa_core._array import HostArray, HostMask

# A row is heavy if the basis misses this share of the residual of the whole stream in it alone,
# and this many times the mean residual of a row.
_HEAVY_SHARE = 0.01
_HEAVY_RATIO = 8.0
# A row of which the basis misses nothing is heavy, too, if it is to be rounded and has this share
# of the residual: its rounding, 2^-9 of its energy, would hide that much of the others.
_ROUNDED_SHARE = 0.25
# More energy than a row has. Files of states hold no infinity.
_ANY_ENERGY = sys.float_info.max
# A change is found when blocks have missed this share of the residual beyond the usual.
_CHANGE = 0.02
# Share of the usual by which a block may miss more without counting towards a change.
_SLACK = 0.02


@dataclass(frozen=True)
class NoveltyTest:
    r"""Cumulative-sum test for a rise of the energy that a basis misses.

    A block of weight w, of which the basis misses the energy m, moves

    .. math:: s \leftarrow \max(0,\, s + m - 1.02\, \bar m\, w),

    with :math:`\bar m` the mean of m / w over the blocks before it, or what the basis before missed
    if that is less: the first blocks of a basis may be new themselves. A change is found where s
    exceeds 0.02 of the residual of everything seen. What is lost before a change is found is a
    bounded share of the error, however much of its energy a basis misses as a rule. A change also
    takes a rise of the residual: there are no more than the logarithm of its growth.

    Parameters
    ----------
    residual : float
        Energy outside the leading ``rank`` directions when the basis was chosen.
    heavy_energy : float
        Energy above which a row that the basis misses is heavy.
    heavy_rounded : float
        Energy above which a row is heavy whatever the basis misses of it.
    expected : float
        Energy that the basis before missed of a unit of weight: the most that is usual.
        0 if nothing is expected; the first block then does not count as a rise.
    missed, weight : float
        Energy that the basis has missed since, and the weight of the blocks.
    rise : float
        s.

    References
    ----------
    Page, "Continuous inspection schemes", Biometrika 1954.
    """

    residual: float
    heavy_energy: float
    heavy_rounded: float = _ANY_ENERGY
    expected: float = 0.0
    missed: float = 0.0
    weight: float = 0.0
    rise: float = 0.0

    @classmethod
    def begin(cls, residual: float, rows: int, expected: float, is_half: bool) -> NoveltyTest:
        """Return the test of a basis chosen after so many rows with this residual."""
        residual = max(0.0, residual)
        heavy = max(_HEAVY_SHARE, _HEAVY_RATIO / rows) * residual
        rounded = _ROUNDED_SHARE * residual if is_half else _ANY_ENERGY
        return cls(residual, heavy, rounded, expected)

    @property
    def usual(self) -> float:
        """Energy that the basis usually misses of a unit of weight."""
        return self.missed / self.weight if self.weight else self.expected

    def heavy(self, missed: HostArray, energies: HostArray) -> HostMask:
        """Return which rows (n,) are heavy, from their energies and what the basis misses of it."""
        mask: HostMask = (missed > self.heavy_energy) | (energies > self.heavy_rounded)
        return mask

    def after(
        self, missed: list[float], weights: list[float], is_first: bool
    ) -> tuple[int, NoveltyTest]:
        """Return how many of the next blocks lie before a change, and the test after these.

        ``is_first`` says that the first of them is the block that the basis was chosen on: what the
        basis misses of it is no measure of the usual.
        """
        total, weight, rise = self.missed, self.weight, self.rise
        count = 0
        for energy, mass in zip(missed, weights, strict=True):
            usual = total / weight if weight else self.expected
            usual = min(usual, self.expected or usual)
            risen = max(0.0, rise + energy - (1.0 + _SLACK) * usual * mass) if usual else rise
            counted = 0.0 if is_first and not count else 1.0
            if risen > _CHANGE * (self.residual + total + counted * energy):
                break
            total, weight, rise = total + counted * energy, weight + counted * mass, risen
            count += 1
        test = replace(self, missed=total, weight=weight, rise=rise)
        return count, test
