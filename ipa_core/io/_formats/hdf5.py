"""HDF5 files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ipa_core.errors import (
    FileFormatError,
)
from ipa_core.io._formats.array_blocks import ROWS_AT_A_TIME, LabeledRows, check_rows, native
from ipa_core.io._formats.named_arrays import chosen, label_of
from ipa_core.optional_dependencies import import_optional


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
                yield label_of(name, start, block), native(block)
