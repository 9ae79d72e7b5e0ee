"""NumPy files: .npy and .npz."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ipa_core.errors import (
    FileFormatError,
)
from ipa_core.io._formats.array_blocks import (
    ROWS_AT_A_TIME,
    LabeledRows,
    check_rows,
    check_shape,
    native,
    read_in_blocks,
)
from ipa_core.io._formats.named_arrays import chosen, label_of
from ipa_core.io.prefetch import prefetch


def read_npz(file: Path, key: str | None) -> Iterator[LabeledRows]:
    """Read the arrays of a NumPy archive, one in memory at a time."""
    with np.load(file, allow_pickle=False) as archive:
        for name in chosen(file, archive.files, key):
            array = archive[name]
            check_rows(file, name, array.shape, array.dtype.newbyteorder("="))
            for start in range(0, array.shape[0], ROWS_AT_A_TIME):
                rows = array[start : start + ROWS_AT_A_TIME]
                yield label_of(name, start, rows), native(rows)


def read_npy(file: Path) -> Iterator[LabeledRows]:
    """Read the array of a NumPy file, which is mapped into memory, in blocks of rows."""
    try:
        array: Any = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, TypeError, SyntaxError, KeyError) as error:
        array = _empty_npy(file)
        if array is None:
            raise FileFormatError(
                f"{file}: expected a .npy file of numbers, got {error}"
            ) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise FileFormatError(
            f"{file}: expected a .npy file of one array, got an .npz archive; "
            "save each array with numpy.save"
        )
    check_shape(str(file), array.shape)
    prefetch(file)
    start = getattr(array, "offset", 0)
    for label, rows in read_in_blocks(array):
        start += rows.nbytes
        prefetch(file, start, rows.nbytes)
        yield label, rows


def _empty_npy(file: Path) -> Any:
    """Return the array of a file without entries, which cannot be memory-mapped; None otherwise."""
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, TypeError, SyntaxError, KeyError):
        return None
    return array if isinstance(array, np.ndarray) and array.size == 0 else None
