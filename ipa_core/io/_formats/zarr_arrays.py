"""Zarr arrays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ipa_core.errors import (
    FileFormatError,
)
from ipa_core.io._formats.array_blocks import ROWS_AT_A_TIME, LabeledRows, check_shape
from ipa_core.io._formats.named_arrays import label_of
from ipa_core.optional_dependencies import import_optional


def read_zarr(file: Path) -> Iterator[LabeledRows]:
    """Read about 8,192 rows at a time, in whole chunks: each chunk is decompressed once."""
    zarr = import_optional("zarr", extra="dask", user=str(file))

    try:
        array = zarr.open_array(file, mode="r")
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise FileFormatError(f"{file}: expected a Zarr array of numbers, got {error}") from error
    check_shape(str(file), tuple(array.shape))
    chunk = int(array.chunks[0])
    step = max(1, ROWS_AT_A_TIME // chunk) * chunk
    for start in range(0, array.shape[0], step):
        rows = np.asarray(array[start : start + step])
        yield label_of(None, start, rows), rows
