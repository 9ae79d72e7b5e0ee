"""Randomized SVD of an endless matrix: segments of Nystrom sketches that look ahead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

from ipa_core import _array
from ipa_core._array import Array, HostArray, Namespace
from ipa_core._linalg import (
    gram,
    nystrom_rows,
    orthonormal_columns,
    principal_rows,
    top_eigh,
    truncate_rows,
)
from ipa_core.errors import SettingError
from ipa_core.learners._row_blocks import RowChunks, Rows, take_first
from ipa_core.learners.base import Guarantee, Learner

# Lengths of the segments, in sketch widths; the last one is that of all that follow. Short ones
# first: a short stream then sees several bases, and on a long one their cost is forgotten.
_SEGMENTS = (8, 32, 128, 400)
# Rows that are decomposed, that a basis is chosen on, or that are looked at for novelty, at a time.
_BLOCK = 128
# Widths of the sketch are multiples of this: products with 72 columns take as long as with 80.
_COLUMNS = 16
# Blocks of the energy of one that an image has to have room for: more than a segment has.
_ROOM = 2.0**12
# A block that misses this many times the usual share of its energy holds something new.
_NOVEL = 2.0


@dataclass(frozen=True)
class PendingSketch:
    """Projections of row pieces onto a basis; their squared norms are being copied to the host."""

    seen: tuple[Array, ...]
    squares: tuple[Callable[[], HostArray], ...]

    def captured_energy(self) -> HostArray:
        """Wait for the squared lengths of what the basis sees."""
        return _array.host_concat([read() for read in self.squares])


class RandomizedSVD(Learner):
    r"""Streaming randomized SVD at the cost of two skinny matrix products: the default learner.

    The stream is cut into segments. Within one, with a fixed orthonormal basis O of
    k = rank + oversample columns, only

    .. math:: Y \leftarrow Y + X^\top W X O

    happens. At its end the segment's second moment is recovered by Nystrom's formula,
    :math:`C \approx Y (O^\top Y)^{-1} Y^\top`, and folded into a factor F of 5k/4 rows. The
    next basis holds the leading rows of F and k/8 probes: randomly signed sums of the rows about to
    come, power-iterated once on them, which look for what F does not know. Segments have 8 k rows,
    32 k, 128 k, and 400 k from then on. A block of 128 rows of which the basis misses twice what it
    usually does, of the block's own energy and of the usual one, ends the segment and is decomposed
    exactly, as the first block of all is.

    Where there are at most 2k features, the whole second moment costs about as much or less, and is
    kept instead, in float64 where there is one: the result is then exact.

    Guarantee: bounded. Time two products, O(4 k d) for a row, and about a tenth on a long stream,
    the check of the rows included; memory O(4 k d).

    Parameters
    ----------
    rank, center, seed
        As for every `Learner`.
    oversample : int, optional
        Columns of the sketch beyond the rank; default rank + 8, and what makes the width k the
        next multiple of 16. More is more accurate and costs in proportion.

    References
    ----------
    Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011.
    Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite
    matrix from streaming data", NeurIPS 2017.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import RandomizedSVD
    >>> x = np.random.default_rng(0).standard_normal((1000, 50)) / np.arange(1, 51)
    >>> learner = RandomizedSVD(rank=5)
    >>> for batch in np.split(x, 10):
    ...     learner = learner.update(batch)
    >>> learner.finalize()
    Projector(rank=5, features=50, captured=0.899, samples=1000, numpy float64 on cpu)
    """

    guarantee = Guarantee("bounded", 0.05)
    _settings: ClassVar[tuple[str, ...]] = (*Learner._settings, "oversample")
    _numbers: ClassVar[tuple[str, ...]] = (
        *Learner._numbers,
        "_segments",
        "_segment_rows",
        "_unit",
        "_residual_energy",
        "_seen_energy",
        "_seen_weight",
    )
    _arrays: ClassVar[tuple[str, ...]] = (
        *Learner._arrays,
        "_factor",
        "_basis",
        "_image",
        "_moment",
    )

    def __init__(
        self, rank: int, *, oversample: int | None = None, center: bool = False, seed: int = 0
    ) -> None:
        super().__init__(rank, center=center, seed=seed)
        if oversample is not None and oversample < 0:
            raise SettingError(f"expected oversample of at least 0, got {oversample}")
        self.oversample: int = (
            math.ceil((2 * rank + 8) / _COLUMNS) * _COLUMNS - rank
            if oversample is None
            else oversample
        )
        self._factor: Array = None  # F, closed segments
        self._basis: Array = None  # O / unit, open segment
        self._image: Array = None  # Y^T / unit, open segment
        self._moment: Array = None  # the whole second moment, instead of all these
        self._unit = 1.0
        self._segments = 0
        self._segment_rows = 0
        self._residual_energy = 0.0
        self._seen_energy = 0.0
        self._seen_weight = 0.0

    @property
    def _width(self) -> int:
        return self.rank + self.oversample

    @cached_property
    def _whole_moment(self) -> bool:
        """True if X^T X takes no more operations than X O and X^T (X O)."""
        return int(self._template.shape[1]) <= 2 * self._width

    @property
    def _factor_rows(self) -> int:
        """Rows of the factor: some more than a basis takes over."""
        return self._width + self._width // 4

    @property
    def _probes(self) -> int:
        return max(1, self._width // 8)

    @cached_property
    def _block_rows(self) -> int:
        # A power of two divides most batches of sequences: no rows are copied to wait.
        return max(_BLOCK, 1 << (self._width - 1).bit_length())

    def _absorb_rows(self, xp: Namespace, rows: Rows) -> None:
        self._absorb(xp, RowChunks((rows,)))

    def _absorb_chunks(self, xp: Namespace, chunks: RowChunks) -> None:
        if self.center:  # each block is taken about its own mean
            return super()._absorb_chunks(xp, chunks)
        self._weight += float(chunks.host_weights.sum())
        self._energy += float(chunks.energies().sum())
        self._absorb(xp, chunks)

    def _absorb(self, xp: Namespace, chunks: RowChunks) -> None:
        if self._whole_moment:
            return self._add_moment(xp, chunks)
        while (done := self._absorb_some(xp, chunks)) < chunks.count:
            chunks = chunks.cut(done, chunks.count)

    def _add_moment(self, xp: Namespace, chunks: RowChunks) -> None:
        for part in chunks.parts:
            moment = gram(xp, part.sqrt_weighted(xp).T)
            self._moment = moment if self._moment is None else self._moment + moment

    def _begin_sketch(self, xp: Namespace, parts: tuple[Array, ...]) -> PendingSketch | None:
        """Look at what the open segment will take of the rows, if they turn out to be fit."""
        if self._basis is None or self.center:
            return None
        count = self._whole_rows(sum(part.shape[0] for part in parts))
        return self._sketch(xp, take_first(parts, min(count, self._rows_left()))) if count else None

    def _sketch(self, xp: Namespace, parts: tuple[Array, ...]) -> PendingSketch:
        with (
            _array.ignore_overflow()
        ):  # what overflows here is too large for this segment, see _familiar
            seen = tuple(part @ self._basis for part in parts)
            squares = tuple(_array.squared_norms_async(xp, part) for part in seen)
        return PendingSketch(seen, squares)

    def _absorb_some(self, xp: Namespace, chunks: RowChunks) -> int:
        """Absorb the first block exactly, or familiar ones in a segment; return how many rows."""
        if self._factor is None:
            return self._decompose(xp, chunks)
        opening = self._basis is None
        if opening:
            self._begin_segment(xp, chunks.cut(0, self._block_ends(chunks)[0]).joined(xp))
        ends = self._block_ends(chunks)[: self._rows_left() // self._block_rows]
        sketch = chunks.sketch
        chunks = chunks.cut(0, ends[-1])
        if sketch is None:
            sketch = self._sketch(xp, tuple(part.x for part in chunks.parts))
        known = self._count_explained_rows(xp, chunks, sketch.captured_energy(), ends, opening)
        if not known:
            self._fold_segment(xp)
            return self._decompose(xp, chunks)
        for part, seen in zip(chunks.cut(0, known).parts, sketch.seen, strict=False):
            seen = part.apply_weights(seen[: part.count, :])
            self._image = self._image + seen.T @ part.x
        self._segment_rows += known
        if self._segment_rows >= self._segment_limit():
            self._fold_segment(xp)
        return known

    def _rows_left(self) -> int:
        """Return how many rows the open segment takes until it ends, in whole blocks."""
        rows = self._segment_limit() - self._segment_rows
        return math.ceil(rows / self._block_rows) * self._block_rows

    def _block_ends(self, chunks: RowChunks) -> list[int]:
        """Return where the blocks of a run end; the last one takes what exceeds whole blocks."""
        size = self._block_rows
        return [*range(size, chunks.count - size + 1, size), chunks.count]

    def _decompose(self, xp: Namespace, chunks: RowChunks) -> int:
        """Fold the first block into the factor as it is."""
        block = chunks.cut(0, self._block_ends(chunks)[0])
        self._stack(xp, block.joined(xp).sqrt_weighted(xp))
        return block.count

    def _absorb_summary(self, xp: Namespace, other: Self) -> None:
        if self._whole_moment:
            self._moment = self._moment + other._moment
            return
        self._fold_segment(xp)
        other._fold_segment(xp)
        self._stack(xp, other._factor)
        self._residual_energy += other._residual_energy
        self._seen_energy += other._seen_energy
        self._seen_weight += other._seen_weight

    def _condense(self, xp: Namespace) -> None:
        self._fold_segment(xp)

    def _solve(self, xp: Namespace) -> tuple[Array, Array]:
        if self._whole_moment:
            values, vectors = top_eigh(xp, self._moment, self.rank)
            return vectors.T, values
        rows = self._factor
        if self._basis is not None:
            rows = xp.concat([rows, nystrom_rows(xp, self._basis, self._image)])
        return principal_rows(xp, rows, self.rank)

    def _segment_limit(self) -> int:
        return self._width * _SEGMENTS[min(self._segments, len(_SEGMENTS) - 1)]

    def _count_explained_rows(
        self,
        xp: Namespace,
        chunks: RowChunks,
        captured_energy: HostArray,
        ends: list[int],
        opening: bool,
    ) -> int:
        """Return where the leading blocks end of which the basis misses no more than usual."""
        energies, host_weights = chunks.energies(), chunks.host_weights
        missed_rows = energies - captured_energy * host_weights * self._unit**2
        sums = (_array.group_sums(values, ends) for values in (energies, missed_rows, host_weights))
        limits = xp.finfo(self._basis.dtype)
        rounding = 100 * float(limits.eps)
        # The image holds energies over the unit. Rows too large for that need another unit.
        most = float(limits.max) / _ROOM * self._unit
        begin = 0
        for end, energy, missed, weight in zip(ends, *sums, strict=True):
            # The basis was chosen on its first block, which therefore says nothing about novelty.
            if begin or not opening:
                missed = max(0.0, missed)
                usual = self._residual_energy / self._seen_energy if self._seen_energy else 1.0
                # A few huge rows carry most of the energy of some layers. A block without them
                # misses a large share of its own energy, but of nothing that matters.
                mean = self._seen_energy / self._seen_weight if self._seen_weight else 0.0
                new = missed > (_NOVEL * usual + rounding) * max(energy, mean * weight)
                if new or energy > most:
                    return begin
                self._residual_energy += missed
                self._seen_energy += energy
                self._seen_weight += weight
            begin = end
        return begin

    def _begin_segment(self, xp: Namespace, rows: Rows) -> None:
        """Choose the basis: the leading rows of F, and probes of the block about to come."""
        count = min(self._factor.shape[0], self._width - self._probes)
        kept = self._factor[:count, :]
        shape = (self._width - count, rows.count)
        signs = _array.from_numpy(
            xp,
            _array.random_signs(shape, self.seed, self._segments),
            _array.device(rows.x),
            rows.x.dtype,
        )
        self._unit = rows.unit()
        tests = orthonormal_columns(xp, (signs @ rows.apply_weights(rows.x)).T) / self._unit
        probes = rows.x.T @ rows.apply_weights(rows.x @ tests)
        self._basis = orthonormal_columns(xp, xp.concat([kept.T, probes], axis=1)) / self._unit
        self._image = xp.zeros_like(self._basis.T)
        self._segment_rows = 0

    def _fold_segment(self, xp: Namespace) -> None:
        """Fold the open segment, if any, into the factor."""
        if self._basis is None:
            return
        self._stack(xp, nystrom_rows(xp, self._basis, self._image))
        self._basis = self._image = None
        self._segments += 1

    def _stack(self, xp: Namespace, rows: Array) -> None:
        """Fold rows into the factor."""
        stacked = rows if self._factor is None else xp.concat([self._factor, rows])
        self._factor = truncate_rows(xp, stacked, self._factor_rows)
