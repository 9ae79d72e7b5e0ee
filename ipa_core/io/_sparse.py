"""Sparse matrices of SciPy as streams: dense blocks of bounded size, never the whole matrix."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from ipa_core._array import Array
from ipa_core.errors import ShapeError

# Entries of a dense block: 8 MB in float32.
_BLOCK_ENTRIES = 1 << 21


def is_sparse(value: object) -> bool:
    """Return whether a value is a sparse matrix or array of SciPy, without importing SciPy."""
    library = sys.modules.get("scipy.sparse")
    return library is not None and bool(library.issparse(value))


def dense_blocks(
    matrix: Any, weights: Array | None, most_rows: int
) -> Iterator[tuple[Array, Array | None]]:
    """Yield the rows of a sparse matrix as dense blocks, each with its weights.

    Raises
    ------
    ShapeError
        If the weights are not one for each row.
    """
    rows = (matrix if matrix.ndim == 2 else matrix.reshape(1, -1)).tocsr()
    if weights is not None and tuple(weights.shape) != rows.shape[:1]:
        raise ShapeError(
            f"expected weights of shape {rows.shape[:1]}, one for each row, "
            f"got {tuple(weights.shape)}"
        )
    step = min(most_rows, max(1, _BLOCK_ENTRIES // max(1, rows.shape[1])))
    for start in range(0, rows.shape[0], step):
        part = slice(start, min(start + step, rows.shape[0]))
        yield rows[part].toarray(), None if weights is None else weights[part]
