"""Randomized SVD of an endless matrix: segments of Nystrom sketches that look ahead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import ClassVar, Self

from ipa_core import _array, settings
from ipa_core._array import Array, DType, HostArray, HostMask, Namespace
from ipa_core._linalg import principal_rows, truncate_rows, unit_rows
from ipa_core.learners._novelty_detection import NoveltyTest
from ipa_core.learners._nystrom_segment import BLOCK, Segment, with_probes
from ipa_core.learners._row_blocks import Product, RowChunks, Rows, Sketch, take_first
from ipa_core.learners._second_moment import SecondMoment
from ipa_core.learners.base import Learner
from ipa_core.learners.guarantee import Guarantee

# Lengths of the first segments, in sketch widths; each further one is twice as long. Short ones
# first: a short stream then sees several bases, and on a long one their cost is forgotten.
_LENGTHS = (2, 8, 24, 80, 400)
# States from before lengths doubled count each segment of the last length: some have hundreds.
_MOST_DOUBLINGS = 12
# Number of the length to go on with after a change of the stream.
_LENGTH_AFTER_CHANGE = 1
# Share of the energy that a basis must miss for its products to be taken in half precision.
_LEAST_MISSED = 2.0**-5
# Widths of the sketch are multiples of this: products with 72 columns take as long as with 80.
_COLUMNS = 16


class RandomizedSVD(Learner):
    r"""Streaming randomized SVD at the cost of two skinny matrix products: the default learner.

    The stream is cut into segments. Within a segment, with a fixed orthonormal basis O of
    k = rank + oversample columns, only

    .. math:: Y \leftarrow Y + X^\top W X O

    happens. At its end the segment's second moment is recovered by Nystrom's formula,
    :math:`C \approx Y (O^\top Y)^{-1} Y^\top`, and folded into a factor F of 5k/4 rows. The
    next basis holds the leading rows of F and k/8 probes: randomly signed sums of what the next 128
    rows have outside of F, power-iterated once on them. Segments have 2 k rows, 8 k, 24 k, 80 k,
    400 k, and twice as many each time from then on. The first block of 128 rows is decomposed
    exactly.

    Rows that O does not explain are looked for in every block, by their squared lengths. A row that
    alone would add a hundredth to the error is kept whole and folded into F. Where blocks miss more
    than those before them, and the difference adds up to a fiftieth of the error, the segment ends;
    the next basis is half probes, and segments are short again.

    Up to 2k features the whole second moment costs about as much or less. It is kept instead, as
    `ExactCovariance` does: the result is then exact.

    Guarantee: bounded. It is a statement about what such a sketch can see: the excess error stays
    within the bound where no direction outside of O grows by less than a fiftieth of the error in
    every segment, spread over rows none of which is heavy. No memory of O(k d) can exclude that.
    Time two products, O(4 k d) for a row, and about a tenth on a long stream, the check of the rows
    included; memory O(4 k d).

    Parameters
    ----------
    rank, center, seed
        As for every `Learner`.
    oversample : int, optional
        Columns of the sketch beyond the rank; default rank + 8, and what makes the width k the
        next multiple of 16. More is more accurate and costs in proportion.
    half_products : bool, default True
        Round float32 rows, O and X O to bfloat16 for the two products where the processor
        multiplies that faster: torch on CPUs with bfloat16 instructions, and on CUDA devices of
        compute capability 8.0 and above. Rows in bfloat16 are multiplied as they are,
        without a copy in float32. The image is summed in float32. The excess error moves by 1e-7 to
        4e-6. Norms, exact blocks and decompositions stay in float32 and float64, and so do segments
        of which a basis misses less than 1/32.

    Raises
    ------
    SettingError
        If ``oversample`` is not an integer of at least 0.

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
    _settings: ClassVar[tuple[str, ...]] = (*Learner._settings, "oversample", "half_products")
    _numbers: ClassVar[tuple[str, ...]] = (
        *Learner._numbers,
        "_rows_absorbed",
        "_segments_begun",
        "_length",
        "_expected",
    )
    _arrays: ClassVar[tuple[str, ...]] = (*Learner._arrays, "_factor", "_heavy")
    _values: ClassVar[Mapping[str, type]] = {
        "_moment": SecondMoment,
        "_segment": Segment,
        "_novelty": NoveltyTest,
    }

    def __init__(
        self,
        rank: int,
        *,
        oversample: int | None = None,
        half_products: bool = True,
        center: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(rank, center=center, seed=seed)
        self.oversample: int = (
            math.ceil((2 * self.rank + 8) / _COLUMNS) * _COLUMNS - self.rank
            if oversample is None
            else settings.integer("oversample", oversample, least=0)
        )
        self.half_products = settings.boolean("half_products", half_products)
        self._moment: SecondMoment | None = None  # instead of all that follows
        self._factor: Array = None  # F, of the closed segments
        self._segment: Segment | None = None  # the open segment
        self._novelty: NoveltyTest | None = None  # of the open segment
        self._heavy: Array = None  # heavy rows of the open segment, times their root weights
        self._rows_absorbed = 0
        self._segments_begun = 0
        self._length = 0  # index of the open segment's length
        self._expected = 0.0  # energy that a basis is expected to miss of a unit of weight

    @property
    def _width(self) -> int:
        return self.rank + self.oversample

    @cached_property
    def _is_exact(self) -> bool:
        """True if X^T X takes no more operations than X O and X^T (X O)."""
        return int(self._template.shape[1]) <= 2 * self._width

    @cached_property
    def _block_rows(self) -> int:
        # A power of two divides most batches of sequences: no rows are copied to wait.
        return max(BLOCK, 1 << (self._width - 1).bit_length())

    def _absorb_rows(self, xp: Namespace, rows: Rows) -> None:
        for _ in self._absorb(xp, RowChunks((rows,))):
            pass

    def _absorb_chunks(self, xp: Namespace, chunks: RowChunks) -> None:
        if self.center:  # each block is taken about its own mean
            return super()._absorb_chunks(xp, chunks)
        for piece in self._absorb(xp, chunks):
            self._weight += float(piece.host_weights.sum())
            self._energy += float(piece.energies.sum())

    def _absorb(self, xp: Namespace, chunks: RowChunks) -> Iterator[RowChunks]:
        """Absorb rows piece by piece; yield each piece when it is absorbed."""
        while chunks.count:
            if self._is_exact:
                done = self._add_to_moment(xp, chunks)
            elif self._factor is None:
                done = self._decompose(xp, chunks)
            else:
                done = self._add_to_segment(xp, chunks)
            self._rows_absorbed += done
            if done:
                yield chunks.cut(0, done)
            chunks = chunks.cut(done, chunks.count).without_sketch()

    def _add_to_moment(self, xp: Namespace, chunks: RowChunks) -> int:
        for part in chunks.parts:
            moment = SecondMoment.of(xp, part.sqrt_weighted(xp))
            self._moment = moment if self._moment is None else self._moment.plus(xp, moment)
        return chunks.count

    def _decompose(self, xp: Namespace, chunks: RowChunks) -> int:
        """Fold the first block into the factor as it is."""
        block = self._first_block(xp, chunks)
        self._fold(xp, [block.copy(xp).sqrt_weighted(xp)])
        return block.count

    def _first_block(self, xp: Namespace, chunks: RowChunks) -> Rows:
        return chunks.first_block(xp, self._block_rows).cast(xp, self._template.dtype)

    def _add_to_segment(self, xp: Namespace, chunks: RowChunks) -> int:
        """Add the leading blocks that the segment explains; return how many rows these have."""
        if self._segment is None:
            self._begin_segment(xp, self._first_block(xp, chunks), max(1, self._width // 8))
        assert self._segment is not None and self._novelty is not None
        ends = chunks.block_ends(self._block_rows)[: self._rows_left() // self._block_rows]
        chunks = chunks.cut(0, ends[-1])
        sketch = chunks.sketch or self._segment.sketch(xp, chunks)
        missed = self._segment.missed_energies(xp, chunks, sketch)
        heavy = self._novelty.heavy(missed, chunks.energies)
        count = self._count_explained_rows(xp, chunks, missed, heavy)
        if count:
            self._add_explained(xp, chunks.cut(0, count), sketch, heavy[:count])
        else:
            self._restart(xp, chunks)
        return count

    def _count_explained_rows(
        self, xp: Namespace, chunks: RowChunks, missed: HostArray, heavy: HostMask
    ) -> int:
        """Return how many rows the leading blocks have before a change of the stream."""
        assert self._segment is not None and self._novelty is not None
        ends = chunks.block_ends(self._block_rows)
        energies, heavy_rows = (_array.group_sums(v, ends) for v in (chunks.energies, heavy))
        room = self._block_rows - self._heavy_count()
        blocks = self._segment.fitting_blocks(xp, energies, heavy_rows, room)
        light = _array.group_sums(_array.zero_where(missed, heavy), ends)[:blocks]
        sums = _array.group_sums(chunks.host_weights, ends)[:blocks]
        explained, self._novelty = self._novelty.after(light, sums, not self._segment.rows)
        return ends[explained - 1] if explained else 0

    def _add_explained(
        self, xp: Namespace, chunks: RowChunks, sketch: Sketch, heavy: HostMask
    ) -> None:
        """Add rows to the segment, heavy ones apart; end it when it is due."""
        assert self._segment is not None
        self._segment = self._segment.add(xp, chunks, sketch, heavy)
        for part, mask in zip(chunks.parts, chunks.split(heavy), strict=True):
            if mask.any():
                self._set_aside(xp, part.select(xp, mask))
        is_long = self._segment.rows >= _segment_rows(self._width, self._length)
        if is_long:
            self._length += 1
        if is_long or self._heavy_count() >= self._block_rows:
            self._fold_segment(xp)

    def _set_aside(self, xp: Namespace, heavy: Rows) -> None:
        """Keep heavy rows whole until the segment ends."""
        rows = heavy.cast(xp, self._template.dtype).sqrt_weighted(xp)
        self._heavy = rows if self._heavy is None else xp.concat([self._heavy, rows])

    def _heavy_count(self) -> int:
        return 0 if self._heavy is None else int(self._heavy.shape[0])

    def _rows_left(self) -> int:
        """Return how many rows the open segment takes until it ends, in whole blocks."""
        assert self._segment is not None
        rows = _segment_rows(self._width, self._length) - self._segment.rows
        return math.ceil(rows / self._block_rows) * self._block_rows

    def _restart(self, xp: Namespace, chunks: RowChunks) -> None:
        """End the segment at a change of the stream, and begin one that looks for what is new."""
        self._fold_segment(xp)
        self._length = min(self._length, _LENGTH_AFTER_CHANGE)
        self._expected = 0.0
        self._begin_segment(xp, self._first_block(xp, chunks), max(1, self._width // 2))

    @property
    def _uncast_dtype(self) -> DType | None:
        """Half precision of rows that the open segment multiplies as they are."""
        if self._segment is None or not self._segment.is_half or self.center:
            return None
        return _array.half_dtype(self._xp, _array.device(self._template))

    def _begin_sketch(self, xp: Namespace, parts: tuple[Array, ...]) -> tuple[Product, ...]:
        if self._segment is None or self.center:
            return ()
        count = self._whole_rows(sum(part.shape[0] for part in parts))
        return self._segment.multiply(xp, take_first(parts, min(count, self._rows_left())))

    def _begin_segment(self, xp: Namespace, block: Rows, probes: int) -> None:
        """Choose a basis for the block and what follows it."""
        energies = _array.row_energies(xp, self._factor)
        residual = self._energy - float(_array.on_host(energies)[: self.rank].sum())
        missed = self._expected * self._weight
        is_half = self._allows_half(xp) and missed > _LEAST_MISSED * self._energy
        self._novelty = NoveltyTest.begin(residual, self._rows_absorbed, self._expected, is_half)
        seed = self.seed, self._segments_begun
        count = min(self._factor.shape[0], self._width - probes)
        known = unit_rows(xp, self._factor[:count, :], energies[:count])
        rows = with_probes(xp, known, block, self._width, seed)
        self._segment = Segment.begin(xp, rows, block.unit(), is_half)
        self._segments_begun += 1

    def _allows_half(self, xp: Namespace) -> bool:
        """Return whether rows may be rounded for the products on this device."""
        half = _array.half_dtype(xp, _array.device(self._template))
        return self.half_products and half is not None and self._template.dtype == xp.float32

    def _fold_segment(self, xp: Namespace) -> None:
        """Fold the open segment and its heavy rows, if any, into the factor."""
        rows = self._open_rows(xp)
        if self._novelty is not None:
            self._expected = self._novelty.usual
        self._segment = self._novelty = self._heavy = None
        if rows:
            self._fold(xp, rows)

    def _fold(self, xp: Namespace, rows: list[Array]) -> None:
        """Fold pieces of rows into the factor."""
        pieces = rows if self._factor is None else [self._factor, *rows]
        self._factor = truncate_rows(xp, pieces, self._width + self._width // 4)

    def _open_rows(self, xp: Namespace) -> list[Array]:
        """Return what the open segment adds to the factor."""
        rows = (
            [] if self._segment is None or not self._segment.rows else [self._segment.to_factor(xp)]
        )
        return rows if self._heavy is None else [*rows, self._heavy]

    def _absorb_summary(self, xp: Namespace, other: Self) -> None:
        if self._is_exact:
            assert self._moment is not None and other._moment is not None
            self._moment = self._moment.plus(xp, other._moment)
            return
        self._fold_segment(xp)
        other._fold_segment(xp)
        self._fold(xp, [other._factor])
        self._rows_absorbed += other._rows_absorbed

    def _condense(self, xp: Namespace) -> None:
        self._fold_segment(xp)

    def _solve(self, xp: Namespace) -> tuple[Array, Array]:
        if self._moment is not None:
            return self._moment.principal(xp, self.rank)
        return principal_rows(xp, [self._factor, *self._open_rows(xp)], self.rank)


def _segment_rows(width: int, length: int) -> int:
    """Return the rows at which a segment ends; ``length`` counts `_LENGTHS`, and doublings then."""
    last = len(_LENGTHS) - 1
    doublings = min(max(0, length - last), _MOST_DOUBLINGS)
    return width * _LENGTHS[min(length, last)] << doublings
