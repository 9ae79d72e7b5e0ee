"""Arrays of a file: their names, labels, form, and blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from ipa_core._array import Array
from ipa_core.errors import FileFormatError, ShapeError

LabeledRows: TypeAlias = tuple[str, Array]

ROWS_AT_A_TIME = 8192
# As NumPy, HDF5 and safetensors name them.
_FLOATING = {"float16", "float32", "float64", "F16", "BF16", "F32", "F64"}


def split_key(path: Path) -> tuple[Path, str | None]:
    """Return the file and the name of an array in it, from ``FILE#NAME``."""
    whole = str(path)
    file, mark, key = whole.rpartition("#")
    # A name in HDF5 or safetensors may hold slashes; a file's own name may hold the mark.
    while mark and not Path(file).is_file() and "#" in file:
        file, mark, _ = file.rpartition("#")
        key = whole[len(file) + 1 :]
    if not mark or path.exists() or not Path(file).is_file():
        return path, None
    return Path(file), key


def chosen(file: Path, keys: list[str], key: str | None) -> list[str]:
    """Return the named key, or all keys, sorted.

    Raises
    ------
    FileFormatError
        If the file does not have the key.
    """
    if key is None:
        return sorted(keys)
    if key not in keys:
        known = ", ".join(sorted(keys)[:8]) + (", ..." if len(keys) > 8 else "")
        raise FileFormatError(f"{file}: expected an array named {key!r}, got {known or 'none'}")
    return [key]


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


def label_of(key: str | None, start: int, rows: Array) -> str:
    """Return the words for a block of rows of a file: its array or column, and its rows."""
    place = f"rows {start:,} to {start + rows.shape[0] - 1:,}"
    return place if key is None else f"{key!r}, {place}"


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
