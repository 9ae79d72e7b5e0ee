"""Readers of file formats that hold named arrays or columns: NumPy archives, HDF5, Arrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias
from zipfile import BadZipFile

import numpy as np

from ipa_core._array import Array
from ipa_core.dependencies import import_optional
from ipa_core.errors import FileFormatError

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


def _native(rows: Any) -> Array:
    """Return rows in the byte order of this machine."""
    return rows.astype(rows.dtype.newbyteorder("="), copy=False)


def read_npz(file: Path, key: str | None) -> Iterator[LabeledRows]:
    """Read the arrays of a NumPy archive, one in memory at a time."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            for name in chosen(file, archive.files, key):
                array = archive[name]
                check_rows(file, name, array.shape, array.dtype.newbyteorder("="))
                for start in range(0, array.shape[0], ROWS_AT_A_TIME):
                    rows = array[start : start + ROWS_AT_A_TIME]
                    yield label_of(name, start, rows), _native(rows)
    except (ValueError, EOFError, BadZipFile, AttributeError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{file}: expected a .npz file of numbers, got {error}") from error


def read_hdf5(file: Path, key: str | None) -> Iterator[LabeledRows]:
    """Read the datasets of an HDF5 file, some 8,192 rows at a time, in whole chunks."""
    library = import_optional("h5py", extra="hdf5", user=str(file))
    try:
        source = library.File(file, "r")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileFormatError(f"{file}: expected an HDF5 file, got {error}") from error
    with source:
        names: list[str] = []
        source.visititems(
            lambda name, item: names.append(name) if isinstance(item, library.Dataset) else None
        )
        for name in chosen(file, names, key and key.strip("/")):
            rows = source[name]
            check_rows(file, name, rows.shape, rows.dtype.newbyteorder("="))
            chunk = rows.chunks[0] if rows.chunks else ROWS_AT_A_TIME
            step = max(1, ROWS_AT_A_TIME // chunk) * chunk
            for start in range(0, rows.shape[0], step):
                block = rows[start : start + step]
                yield label_of(name, start, block), _native(block)


def read_arrow(file: Path, key: str | None) -> Iterator[LabeledRows]:
    """Read a Parquet or Arrow file: a column of lists is the rows, or each column a feature."""
    arrow = import_optional("pyarrow", extra="arrow", user=str(file))
    batches = _parquet_batches if file.suffix == ".parquet" else _ipc_batches
    try:
        first = 0
        for batch in batches(file, key):
            for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
                rows = _table_rows(file, batch.slice(start, ROWS_AT_A_TIME))
                yield label_of(key, first + start, rows), rows
            first += batch.num_rows
    except FileNotFoundError:
        raise
    except (arrow.ArrowInvalid, OSError) as error:
        raise FileFormatError(f"{file}: expected a Parquet or Arrow file, got {error}") from error


def _parquet_batches(file: Path, key: str | None) -> Iterator[Any]:
    with import_module("pyarrow.parquet").ParquetFile(file) as source:
        columns = chosen(file, source.schema_arrow.names, key) if key else None
        yield from source.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns)


def _ipc_batches(file: Path, key: str | None) -> Iterator[Any]:
    ipc = import_module("pyarrow.ipc")
    with import_module("pyarrow").memory_map(str(file)) as raw, ipc.open_file(raw) as source:
        columns = chosen(file, source.schema.names, key) if key else source.schema.names
        for number in range(source.num_record_batches):
            yield source.get_batch(number).select(columns)


def _table_rows(file: Path, batch: Any) -> Array:
    """Return the rows (n, features) of a record batch."""
    columns = {
        name: _column(file, name, column)
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
    lists = [name for name, column in columns.items() if column.ndim == 2]
    if lists and len(columns) == 1:
        return columns[lists[0]]
    if lists or not columns:
        raise FileFormatError(
            f"{file}: expected columns of numbers, or one column of lists, got the columns "
            f"{list(columns)}; name a column of lists, as {file.name}#NAME"
        )
    return np.stack([*columns.values()], axis=1)


def _column(file: Path, name: str, column: Any) -> Array:
    """Return a column of numbers as (n,), a column of lists as (n, features)."""
    shape: tuple[int, ...] = (len(column),)
    values = column
    if hasattr(column, "flatten"):  # a column of lists
        lengths = import_module("pyarrow.compute").list_value_length(column).unique().to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            raise FileFormatError(
                f"{file}: expected lists of equal length in column {name!r}, got the lengths "
                f"{lengths[:8]}"
            )
        shape, values = (*shape, lengths[0]), column.flatten()
    if values.null_count or str(values.type) not in ("halffloat", "float", "double"):
        raise FileFormatError(
            f"{file}: expected floating numbers in column {name!r}, got {values.type}"
            f"{' with nulls' if values.null_count else ''}; convert the column, or name that of "
            f"the rows, as {file.name}#NAME"
        )
    return values.to_numpy(zero_copy_only=False).reshape(shape)


READERS: dict[str, Callable[[Path, str | None], Iterator[LabeledRows]]] = {
    ".npz": read_npz,
    ".h5": read_hdf5,
    ".hdf5": read_hdf5,
    ".parquet": read_arrow,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
