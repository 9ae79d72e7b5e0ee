"""Squared lengths of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import array_api_compat
import numpy as np

from ipa_core._array.dtypes import cast, wide_dtype
from ipa_core._array.inspection import device
from ipa_core._array.transfer import on_host, to_host_async
from ipa_core._array.types import Array, HostArray, Namespace
from ipa_core._sparse_rows import is_sparse, squared_lengths
from ipa_core._torch_modes import torch_module


def squared_norms(xp: Namespace, rows: Array) -> Array:
    """Return the squared lengths of rows in one pass without a temporary.

    NumPy's ``vecdot`` does that; torch's builds the products first and takes up to fifty times as
    long as its norm.
    """
    if array_api_compat.is_numpy_namespace(xp):
        return xp.vecdot(rows, rows)
    return xp.linalg.vector_norm(rows, axis=-1) ** 2


def row_energies(xp: Namespace, rows: Array) -> Array:
    """Return the squared lengths of rows, in float64 where there is one."""
    return squared_norms(xp, cast(xp, rows, wide_dtype(xp, device(rows))))


def squared_norms_async(xp: Namespace, matrices: Sequence[Array]) -> Callable[[], list[HostArray]]:
    """Ask for the squared lengths of the rows of matrices; the call of the result waits for them.

    All travel in one transfer, as lengths: their squares may leave the range of the dtype.
    """
    if array_api_compat.is_numpy_namespace(xp):
        squares = [
            squared_lengths(rows) if is_sparse(rows) else on_host(squared_norms(xp, rows))
            for rows in matrices
        ]
        return lambda: squares
    if not matrices:
        return list
    lengths = [_lengths(xp, rows) for rows in matrices]
    read = to_host_async(lengths[0] if len(lengths) == 1 else xp.concat(lengths))
    ends = list(accumulate(int(rows.shape[0]) for rows in matrices))
    return lambda: np.split(read() ** 2, ends[:-1])


def _lengths(xp: Namespace, rows: Array) -> Array:
    """Return the lengths of rows in float32 at least: in half precision they have two digits."""
    if rows.dtype in (xp.float32, xp.float64):
        return xp.linalg.vector_norm(rows, axis=-1)
    if array_api_compat.is_torch_namespace(xp):  # on an accelerator a copy takes three times that
        return torch_module().linalg.vector_norm(rows, dim=-1, dtype=xp.float32)
    return xp.linalg.vector_norm(cast(xp, rows, xp.float32), axis=-1)
