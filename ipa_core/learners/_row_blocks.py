"""Activation rows with their weights and squared lengths: blocks, and runs of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from ipa_core import _sparse_rows
from ipa_core._array import (
    Array,
    DType,
    HostArray,
    HostMask,
    Namespace,
    cast,
    device,
    from_numpy,
    host_concat,
    host_ones,
    on_host,
    squared_norms_async,
)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows ``x`` (n, features), dense or sparse, and ``weights`` (n,) or None for ones.

    ``squares`` |x_i|^2 (n,) and ``host_weights``, a copy of the weights, are on the host in
    float64: their sums decide the next step, and a transfer of n numbers is cheaper than n
    transfers.
    """

    x: Array
    weights: Array | None
    squares: HostArray
    host_weights: HostArray

    @classmethod
    def of(cls, xp: Namespace, x: Array, weights: Array | None = None) -> Rows:
        """Return rows with what is known of them on the host."""
        (squares,) = squared_norms_async(xp, (x,))()
        host_weights = host_ones(squares.size) if weights is None else on_host(weights)
        return cls(x, weights, squares, host_weights)

    @property
    def count(self) -> int:
        return self.squares.size

    def cut(self, start: int, stop: int) -> Rows:
        """Return rows ``start`` to ``stop`` as views."""
        if start == 0 and stop == self.count:
            return self
        part = slice(start, stop)
        weights = None if self.weights is None else self.weights[part]
        return Rows(self.x[part, :], weights, self.squares[part], self.host_weights[part])

    def select(self, xp: Namespace, mask: HostMask) -> Rows:
        """Return the rows (dense copies) where a mask on the host is true."""
        index = from_numpy(xp, mask.nonzero()[0], device(self.x), xp.int64)
        weights = None if self.weights is None else xp.take(self.weights, index)
        sparse = _sparse_rows.is_sparse(self.x)
        x = self.x[mask].toarray() if sparse else xp.take(self.x, index, axis=0)
        return Rows(x, weights, self.squares[mask], self.host_weights[mask])

    def dense(self) -> Rows:
        """Return the rows with a dense ``x``."""
        if not _sparse_rows.is_sparse(self.x):
            return self
        return Rows(self.x.toarray(), self.weights, self.squares, self.host_weights)

    def cast(self, xp: Namespace, dtype: DType) -> Rows:
        """Return the rows with ``x`` in a dtype."""
        if self.x.dtype == dtype:
            return self
        return Rows(cast(xp, self.x, dtype), self.weights, self.squares, self.host_weights)

    def copy(self, xp: Namespace) -> Rows:
        """Return a copy that no later change of the caller's array can reach."""
        weights = None if self.weights is None else xp.asarray(self.weights, copy=True)
        x = self.x.copy() if _sparse_rows.is_sparse(self.x) else xp.asarray(self.x, copy=True)
        return Rows(x, weights, self.squares, self.host_weights)

    def weights_or_ones(self, xp: Namespace) -> Array:
        """Return the weights as an array (n,)."""
        if self.weights is not None:
            return self.weights
        like = _sparse_rows.stored(self.x)
        return xp.ones(self.count, dtype=like.dtype, device=device(like))

    def apply_weights(self, values: Array) -> Array:
        """Multiply each row of ``values`` (n, d) by the row's weight."""
        return values if self.weights is None else values * self.weights[:, None]

    def sqrt_weighted(self, xp: Namespace) -> Array:
        """Return the rows times the roots of their weights: what an unweighted rule may take."""
        x = _sparse_rows.to_dense(self.x)
        return x if self.weights is None else x * xp.sqrt(self.weights)[:, None]

    def total_weight(self) -> float:
        return float(self.host_weights.sum())

    def energies(self) -> HostArray:
        """Return the weighted squared lengths (n,)."""
        return self.squares * self.host_weights

    def energy(self) -> float:
        """Return the weighted sum of the squared lengths."""
        return float(self.energies().sum())

    def unit(self) -> float:
        """Return the power of two nearest to the root mean square entry; 1 for all zeros.

        Dividing by it is exact and keeps products of two rows within the range of the dtype.
        """
        mean_square = float(self.squares.sum()) / (self.count * self.x.shape[1])
        return 2.0 ** round(math.log2(mean_square) / 2) if mean_square > 0.0 else 1.0


@dataclass(frozen=True)
class Product:
    """Product X O of a piece of the rows, and X in the precision in which it was multiplied."""

    x: Array
    seen: Array


@dataclass(frozen=True)
class Sketch:
    """Products X O in the pieces of the rows X, and the squared lengths of their rows."""

    products: tuple[Product, ...]
    squares: HostArray


@dataclass(frozen=True)
class RowChunks:
    """Consecutive rows in the pieces that they came in: nothing is copied to put them together.

    ``sketch`` is what the learner has computed of the leading rows before they were validated.
    """

    parts: tuple[Rows, ...]
    sketch: Sketch | None = None

    @cached_property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    @cached_property
    def host_weights(self) -> HostArray:
        return host_concat([part.host_weights for part in self.parts])

    @cached_property
    def squares(self) -> HostArray:
        return host_concat([part.squares for part in self.parts])

    @cached_property
    def energies(self) -> HostArray:
        """Weighted squared lengths."""
        return self.squares * self.host_weights

    def without_sketch(self) -> RowChunks:
        """Return the rows alone."""
        return RowChunks(self.parts)

    def cut(self, start: int, stop: int) -> RowChunks:
        """Return rows ``start`` to ``stop`` as views."""
        parts, begin = [], 0
        for part in self.parts:
            end = begin + part.count
            if begin < stop and start < end:
                parts.append(part.cut(max(start, begin) - begin, min(stop, end) - begin))
            begin = end
        return RowChunks(tuple(parts), None if start else self.sketch)

    def split(self, mask: HostMask) -> list[HostMask]:
        """Cut a mask of the rows where their pieces end."""
        ends = list(accumulate(part.count for part in self.parts))
        return [mask[end - part.count : end] for part, end in zip(self.parts, ends, strict=True)]

    def block_ends(self, size: int) -> list[int]:
        """Return where blocks of ``size`` rows end; the last takes what exceeds whole blocks."""
        return [*range(size, self.count - size + 1, size), self.count]

    def first_block(self, xp: Namespace, size: int) -> Rows:
        """Return the first block, sparse if it lies in one piece of sparse rows."""
        block = self.cut(0, self.block_ends(size)[0])
        return block.parts[0] if len(block.parts) == 1 else block.joined(xp)

    def joined(self, xp: Namespace) -> Rows:
        """Return the rows in one dense piece."""
        return join(xp, self.parts)


def take_first(parts: tuple[Array, ...], count: int) -> tuple[Array, ...]:
    """Return the first ``count`` rows of pieces of them, in pieces."""
    kept = []
    for part in parts:
        taken = min(count, part.shape[0])
        kept.append(part[:taken, :])
        count -= taken
    return tuple(part for part in kept if part.shape[0])


def align(xp: Namespace, waiting: tuple[Rows, ...], x: Array, block_rows: int) -> tuple[Array, ...]:
    """Return rows that waited and those of a batch in pieces that begin where a block begins.

    Rows that waited are joined with the first of the batch to a block of their own: every product
    is then of whole blocks. Without any, or if they fill no block together, the batch is returned.
    """
    missing = block_rows - sum(part.count for part in waiting)
    if not waiting or x.shape[0] < missing:
        return (x,)
    block = [*(part.x for part in waiting), x[:missing, :]]
    return xp.concat([_sparse_rows.to_dense(part) for part in block]), x[missing:, :]


def align_rows(
    xp: Namespace, waiting: tuple[Rows, ...], rows: Rows, parts: tuple[Array, ...]
) -> RowChunks:
    """Return rows that waited and those of a batch, in the pieces that `align` has made."""
    if len(parts) == 1:
        return RowChunks((*waiting, rows))
    missing = rows.count - parts[1].shape[0]
    block = join(xp, (*waiting, rows.cut(0, missing)), parts[0])
    return RowChunks((block, rows.cut(missing, rows.count)))


def join(xp: Namespace, parts: tuple[Rows, ...], x: Array | None = None) -> Rows:
    """Stack blocks of rows into a dense one; ``x`` is their stacked arrays, if at hand."""
    if len(parts) == 1:
        return parts[0].dense()
    weights = None
    if any(part.weights is not None for part in parts):
        weights = xp.concat([part.weights_or_ones(xp) for part in parts])
    squares = host_concat([part.squares for part in parts])
    host_weights = host_concat([part.host_weights for part in parts])
    x = xp.concat([_sparse_rows.to_dense(part.x) for part in parts]) if x is None else x
    return Rows(x, weights, squares, host_weights)
