"""Sparse matrices of SciPy as streams: blocks of rows, sparse or dense, never the whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ipa_core._array import Array
from ipa_core._sparse_rows import csr_rows
from ipa_core.errors import ShapeError

# Entries of a dense block: 8 MB in float32.
_BLOCK_ENTRIES = 1 << 21


def sparse_blocks(
    matrix: Any, weights: Array | None, most_rows: int
) -> Iterator[tuple[Any, Array | None]]:
    """Yield the rows of a sparse matrix as sparse blocks, each with its weights.

    Raises
    ------
    ShapeError
        If the weights are not one for each row.
    """
    rows = csr_rows(matrix)
    if weights is not None and tuple(weights.shape) != rows.shape[:1]:
        raise ShapeError(
            f"expected weights of shape {rows.shape[:1]}, one for each row, "
            f"got {tuple(weights.shape)}"
        )
    for start in range(0, rows.shape[0], most_rows):
        part = slice(start, min(start + most_rows, rows.shape[0]))
        yield rows[part], None if weights is None else weights[part]


def dense_blocks(
    matrix: Any, weights: Array | None, most_rows: int
) -> Iterator[tuple[Array, Array | None]]:
    """Yield the rows of a sparse matrix as dense blocks of bounded size, each with its weights.

    Raises
    ------
    ShapeError
        If the weights are not one for each row.
    """
    rows = min(most_rows, max(1, _BLOCK_ENTRIES // max(1, matrix.shape[-1])))
    for block, block_weights in sparse_blocks(matrix, weights, rows):
        yield block.toarray(), block_weights
