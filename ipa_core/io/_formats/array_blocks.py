"""Blocks of rows of an array in a file, after a check of its form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from ipa_core._array import Array
from ipa_core.errors import FileFormatError, ShapeError
from ipa_core.io._formats.named_arrays import label_of

LabeledRows: TypeAlias = tuple[str, Array]

ROWS_AT_A_TIME = 8192
# As NumPy, HDF5 and safetensors name them.
_FLOATING = {"float16", "float32", "float64", "F16", "BF16", "F32", "F64"}


def check_rows(file: Path, key: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Refuse an array that does not hold rows.

    Raises
    ------
    FileFormatError
        If it is not real floating, or has less than two axes.
    """
    if len(shape) < 2 or str(dtype) not in _FLOATING:
        raise FileFormatError(
            f"{file}: expected {key!r} to hold floating rows of shape (..., features), got "
            f"{dtype} of shape {tuple(shape)}; name the array that does, as {file.name}#NAME"
        )


def native(rows: Any) -> Array:
    """Return rows in the byte order of this machine."""
    return rows.astype(rows.dtype.newbyteorder("="), copy=False)


def read_in_blocks(array: Array) -> Iterator[LabeledRows]:
    """Cut an array along its first axis, so that a memory-mapped file is never read whole."""
    if array.ndim < 2:
        yield "", array
        return
    for start in range(0, array.shape[0], ROWS_AT_A_TIME):
        stop = min(start + ROWS_AT_A_TIME, array.shape[0])
        yield label_of(None, start, array[start:stop, ...]), array[start:stop, ...]


def check_shape(source: str, shape: tuple[int, ...]) -> None:
    """Check that the shape of an array is that of rows.

    Raises
    ------
    ShapeError
        If it has less than two axes.
    """
    if len(shape) < 2:
        raise ShapeError(
            f"{source}: expected rows, an array of shape (..., rows, features), got shape {shape}; "
            "save vectors elsewhere, or as an array of one row"
        )
