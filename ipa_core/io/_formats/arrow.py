"""Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ipa_core._array import Array
from ipa_core.errors import (
    FileFormatError,
)
from ipa_core.io._formats.array_blocks import ROWS_AT_A_TIME, LabeledRows
from ipa_core.io._formats.named_arrays import chosen, label_of
from ipa_core.optional_dependencies import import_optional


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
