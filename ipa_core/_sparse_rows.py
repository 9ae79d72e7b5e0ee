"""Sparse rows of SciPy, which is not imported: where there is a sparse matrix, it is loaded."""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np

SparseRows: TypeAlias = Any  # scipy.sparse.csr_array


def is_sparse(value: object) -> bool:
    """Return whether a value is a sparse matrix or array of SciPy."""
    library = sys.modules.get("scipy.sparse")
    return library is not None and bool(library.issparse(value))


def csr_rows(matrix: Any) -> SparseRows:
    """Return a sparse matrix or vector as rows in CSR format, with one value for each entry."""
    library: Any = sys.modules["scipy.sparse"]
    rows = library.csr_array(matrix if matrix.ndim == 2 else matrix.reshape(1, -1))
    if not rows.has_canonical_format:
        rows = rows.copy()
        rows.sum_duplicates()
    return rows


def stored(rows: Any) -> Any:
    """Return the array of the values of sparse rows; dense ones as they are."""
    return rows.data if is_sparse(rows) else rows


def to_dense(rows: Any) -> Any:
    """Return a dense copy of sparse rows; dense ones as they are."""
    return rows.toarray() if is_sparse(rows) else rows


def squared_lengths(rows: SparseRows) -> Any:
    """Return the squared lengths of sparse rows (n,), in float64."""
    squares = rows.data.astype(np.float64) ** 2
    return np.bincount(_row_numbers(rows), weights=squares, minlength=rows.shape[0])


def rows_not_finite(rows: SparseRows) -> int:
    """Return how many sparse rows hold values that are not finite."""
    return np.unique(_row_numbers(rows)[~np.isfinite(rows.data)]).size


def _row_numbers(rows: SparseRows) -> Any:
    """Return the number of the row of each stored value."""
    return np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
