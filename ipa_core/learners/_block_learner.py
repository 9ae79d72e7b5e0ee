"""Absorption of rows by a learner in blocks of a fixed size, however batches cut them."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

from ipa_core import _array, _torch_modes, settings
from ipa_core._array import Array, DType, Namespace
from ipa_core.errors import IPAError
from ipa_core.learners._pending_update import PendingUpdate
from ipa_core.learners._row_blocks import Product, RowChunks, Rows, Sketch, align_rows, join


class BlockLearner(ABC):
    """Learner as its algorithm sees it: blocks of rows, whatever the batches.

    Rows wait until they fill a block. With ``center=True`` a block comes near its own mean, so that
    its second moment is what it adds to the scatter. The parameters are those of `Learner`.
    """

    #: Number of passes over the stream that the learner asks for.
    passes: int = 1

    _settings: ClassVar[tuple[str, ...]] = ("rank", "center", "seed")
    _numbers: ClassVar[tuple[str, ...]] = ("samples", "_weight", "_energy")
    _arrays: ClassVar[tuple[str, ...]] = ("_mean",)
    #: Attributes that hold a dataclass (or None), and its class.
    _values: ClassVar[Mapping[str, type]] = {}

    def __init__(self, rank: int, *, center: bool = False, seed: int = 0) -> None:
        self.rank = settings.rank(rank)
        self.center = settings.boolean("center", center)
        self.seed = settings.integer("seed", seed, least=0)
        self.samples = 0
        self._weight = 0.0
        self._energy = 0.0
        self._template: Array = None  # (0, features): library, device, dtype, features
        self._mean: Array = None
        self._pending: tuple[Rows, ...] = ()

    # Methods of a subclass ----------------------------------------------------------------------

    @property
    @abstractmethod
    def _block_rows(self) -> int:
        """Number of rows in a block, however the batches are cut."""

    @abstractmethod
    def _absorb_rows(self, xp: Namespace, rows: Rows) -> None:
        """Fold a block of rows into the summary, by rebinding attributes."""

    def _absorb_chunks(self, xp: Namespace, chunks: RowChunks) -> None:
        """Fold whole blocks into the summary. Default: one by one."""
        for start in range(0, chunks.count, self._block_rows):
            self._absorb_block(xp, chunks.cut(start, start + self._block_rows).joined(xp))

    @property
    def _uncast_dtype(self) -> DType | None:
        """Half precision in which rows are taken as they are. Default: none."""
        return None

    def _begin_sketch(self, xp: Namespace, parts: tuple[Array, ...]) -> tuple[Product, ...]:
        """Start products of rows that are not validated yet. Default: none."""
        return ()

    def _absorb_shift(self, xp: Namespace, shift: Rows) -> None:
        """Fold in the one row that stands for the distance of two means."""
        self._absorb_rows(xp, shift)

    @abstractmethod
    def _absorb_summary(self, xp: Namespace, other: Self) -> None:
        """Fold the summary of another learner, which has nothing pending, into this one's."""

    def _condense(self, xp: Namespace) -> None:
        """Reduce the state to its smallest form. Default: it is already."""
        return None

    @abstractmethod
    def _solve(self, xp: Namespace) -> tuple[Array, Array]:
        """Return ``rank`` orthogonal directions of any length, and energies summed over rows."""

    # Internals ----------------------------------------------------------------------------------

    @property
    def features(self) -> int | None:
        """Features of a row; None before the first batch."""
        return None if self._template is None else int(self._template.shape[1])

    @property
    def _xp(self) -> Namespace:
        return _array.namespace(self._template)

    def _finish_update(self, update: PendingUpdate[Self]) -> Self:
        if self.samples != update.begun[0] or self._template is not update.begun[1]:
            raise IPAError(
                "expected an update to be finished before another one of the same learner begins, "
                "got rows learned in between; finish the first one first"
            )
        before = self.__dict__.copy()
        try:
            with _torch_modes.isolated(update.template):
                self._learn(update)
        except BaseException:
            self.__dict__ = before
            raise
        return self

    def _learn(self, update: PendingUpdate[Self]) -> None:
        """Wait for the norms of the rows, and absorb the rows."""
        with _array.ignore_overflow():
            squares, *seen = update.squares()
            rows = update.batch.result(squares)
        self._template = update.template
        self.samples += rows.count
        sketch = Sketch(update.products, _array.host_concat(seen)) if seen else None
        self._absorb_whole_blocks(update.batch.xp, rows, update.parts, sketch)

    def _absorb_whole_blocks(
        self, xp: Namespace, rows: Rows, parts: tuple[Array, ...], sketch: Sketch | None
    ) -> None:
        """Absorb rows in blocks of the fixed size; the rest waits."""
        chunks = align_rows(xp, self._pending, rows, parts)
        full = self._whole_rows(chunks.count)
        if full:
            self._absorb_chunks(xp, RowChunks(chunks.parts, sketch).cut(0, full))
            rest = chunks.cut(full, chunks.count).parts
            self._pending = tuple(self._copied(xp, part) for part in rest)
        elif rows.count:
            self._pending = (*self._pending, self._copied(xp, rows))

    def _copied(self, xp: Namespace, rows: Rows) -> Rows:
        """Return rows in the state's dtype that no later change of the batch can reach."""
        return rows.cast(xp, self._template.dtype).copy(xp)

    def _whole_rows(self, count: int) -> int:
        """Return how many of so many rows are in whole blocks."""
        return count - count % self._block_rows

    def _flushed(self) -> Self:
        """Return a copy with nothing pending."""
        done = copy.copy(self)
        if done._pending:
            xp = done._xp
            block, done._pending = join(xp, done._pending), ()
            done._absorb_block(xp, block)
        return done

    def _absorb_block(self, xp: Namespace, rows: Rows) -> None:
        weight = rows.total_weight()
        if self.center:
            rows = self._centered(xp, rows, weight)
        self._weight += weight
        self._energy += rows.energy()
        self._absorb_rows(xp, rows)

    def _centered(self, xp: Namespace, rows: Rows, weight: float) -> Rows:
        """Return rows with the scatter that the block adds to the scatter about the common mean.

        The scatter of two groups about their common mean is the sum of the scatters about their
        own means and of W w / (W + w) times the outer square of the difference D of the means.
        Rows about their mean may all be shifted by sqrt(W / (W + w)) D, or one more row stands for
        the difference: no algorithm needs to handle centering. A D longer than the rows so far
        were on average would take digits from shifted rows.
        """
        x, pilot = rows.x, xp.zeros_like(rows.x[0, :])
        if self._mean is None or self._exceeds(xp, self._mean, 0.01):
            # About its first row the block is small, whatever the mean: no digits cancel.
            pilot = rows.x[0, :]
            x = x - pilot
        offset = rows.weights_or_ones(xp) @ x / weight
        wide = _array.wide_dtype(xp, _array.device(x))
        mean = _array.cast(xp, pilot, wide) + _array.cast(xp, offset, wide)
        if self._mean is None:
            self._mean = mean
            return Rows.of(xp, x - offset, rows.weights)
        difference, share = self._move_mean(mean, weight)
        if self._exceeds(xp, difference, 1.0):
            row = self._shift_row(xp, difference, share * weight)
            return join(xp, (Rows.of(xp, x - offset, rows.weights), row))
        offset = offset - _array.cast(xp, difference * math.sqrt(share), x.dtype)
        return Rows.of(xp, x - offset, rows.weights)

    def _exceeds(self, xp: Namespace, vector: Array, share: float) -> bool:
        """Return whether a share of a vector's energy exceeds the mean energy of a row."""
        return share * float(xp.sum(vector**2)) * self._weight > self._energy

    def _move_mean(self, mean: Array, weight: float) -> tuple[Array, float]:
        """Take another group's mean into the running one; return their difference, W / (W + w)."""
        difference, share = mean - self._mean, self._weight / (self._weight + weight)
        self._mean = self._mean + difference * (1 - share)
        return difference, share

    def _shift_row(self, xp: Namespace, difference: Array, weight: float) -> Rows:
        """Return the row that stands for a difference of means."""
        row = difference * math.sqrt(weight)
        return Rows.of(xp, _array.cast(xp, row, self._template.dtype)[None, :])
