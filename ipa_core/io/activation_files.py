"""Readers of activation files and of folders of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ipa_core._array import Array
from ipa_core.dependencies import import_optional
from ipa_core.errors import (
    FileFormatError,
    IPAError,
    PathError,
    ShapeError,
    StreamError,
)
from ipa_core.io._formats import READERS as NAMED_READERS
from ipa_core.io._formats import (
    ROWS_AT_A_TIME,
    LabeledRows,
    check_rows,
    chosen,
    label_of,
    split_key,
)
from ipa_core.io.files import as_path, input_path

# Bytes of the next file to prefetch, and bytes of one call: Linux silently cuts a longer request
# down to the device's readahead.
_PREFETCH_BYTES, _ADVICE_BYTES = 128 << 20, 1 << 20


def read_path(path: str | os.PathLike[str]) -> Iterator[LabeledRows]:
    """Yield (label, rows) from a file or a folder; labels name the file, tensor and rows."""
    source, key = split_key(as_path(path))
    files = files_of(source)
    for file, following in zip(files, [*files[1:], None], strict=True):
        if following is not None:
            prefetch(following)
        yield from _read_file(file, key)


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files of a folder, sorted by name; a file or a Zarr array gives itself.

    Warns of visible files and folders that are skipped because of their suffix.

    Raises
    ------
    StreamError
        If the folder has no such files, or holds an `ActivationStore` of several layers.
    PathError
        If the path is not that of a file or folder; a `MissingFileError` if there is none.
    """
    source = input_path(path)
    if not source.is_dir() or source.suffix == ".zarr":
        return [source]
    if (source / "index.json").exists():
        raise StreamError(
            f"expected activations of one layer in the folder {source}, got an activation store of "
            "several; read a layer with ipa_core.ActivationStore(folder)[name]"
        )
    try:
        entries = sorted(entry for entry in source.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise PathError(f"{source}: expected a folder that can be read, got {error}") from error
    files = [entry for entry in entries if entry.suffix in _SUFFIXES]
    if not files:
        raise StreamError(f"expected {_LISTED} files in the folder {source}, got none")
    if skipped := [entry.name for entry in entries if entry.suffix not in _SUFFIXES]:
        names = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        warnings.warn(f"{source}: skipped {names}, which hold no activations", stacklevel=2)
    return files


def prefetch(file: Path, start: int = 0, size: int = _PREFETCH_BYTES) -> None:
    """Prefetch part of a file (``posix_fadvise``); a no-op where unsupported."""
    if not (hasattr(os, "posix_fadvise") and file.is_file()):
        return
    with file.open("rb") as raw:
        for offset in range(start, min(start + size, file.stat().st_size), _ADVICE_BYTES):
            os.posix_fadvise(raw.fileno(), offset, _ADVICE_BYTES, os.POSIX_FADV_WILLNEED)


def read_in_blocks(array: Array) -> Iterator[LabeledRows]:
    """Cut an array along its first axis, so that a memory-mapped file is never read whole."""
    if array.ndim < 2:
        yield "", array
        return
    for start in range(0, array.shape[0], ROWS_AT_A_TIME):
        stop = min(start + ROWS_AT_A_TIME, array.shape[0])
        yield label_of(None, start, array[start:stop, ...]), array[start:stop, ...]


def _read_file(file: Path, key: str | None) -> Iterator[LabeledRows]:
    named = _NAMED_READERS.get(file.suffix)
    plain = _READERS.get(file.suffix) if key is None else None
    if named is None and plain is None:
        raise StreamError(
            f"expected a {_LISTED} file or a folder of them, got {file}; "
            "save the activations with numpy.save or safetensors"
        )
    source = input_path(file)
    try:
        blocks = named(source, key) if named else plain(source) if plain else ()
        for label, rows in blocks:
            yield f"{file}, {label}", rows
    except IPAError:
        raise
    except OSError as error:
        raise PathError(f"{file}: expected a file that can be read, got {error}") from error


def _check_rows(source: str, shape: tuple[int, ...]) -> None:
    if len(shape) < 2:
        raise ShapeError(
            f"{source}: expected rows, an array of shape (..., rows, features), got shape {shape}; "
            "save vectors elsewhere, or as an array of one row"
        )


def _read_npy(file: Path) -> Iterator[LabeledRows]:
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
    _check_rows(str(file), array.shape)
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


def _read_safetensors(file: Path, key: str | None) -> Iterator[LabeledRows]:
    try:
        with safe_open(file, framework=_framework(file, key)) as tensors:
            for name in chosen(file, [*tensors.keys()], key):
                rows = tensors.get_slice(name)
                count = rows.get_shape()[0]
                for start in range(0, count, ROWS_AT_A_TIME):
                    batch = rows[start : min(start + ROWS_AT_A_TIME, count)]
                    # bfloat16 comes as a torch tensor; the stream is NumPy for every dtype.
                    batch = batch.float().numpy() if hasattr(batch, "numpy") else batch
                    yield label_of(name, start, batch), batch
    except SafetensorError as error:
        raise FileFormatError(f"{file}: expected a safetensors file, got {error}") from error


def _framework(file: Path, key: str | None) -> str:
    """Return the safetensors framework for the file's dtypes: NumPy has no bfloat16.

    Raises
    ------
    FileFormatError
        If the file is not one of activations, or a tensor not one of rows; names the tensor.
    """
    with safe_open(file, framework="numpy") as tensors:
        kind = (tensors.metadata() or {}).get("format", "")
        if kind.startswith("ipa-"):
            raise FileFormatError(f"{file}: expected activations, got a file of format {kind!r}")
        dtypes = set()
        for name in chosen(file, [*tensors.keys()], key):
            rows = tensors.get_slice(name)
            check_rows(file, name, rows.get_shape(), rows.get_dtype())
            dtypes.add(rows.get_dtype())
    if "BF16" not in dtypes:
        return "numpy"
    import_optional("torch", extra="torch", user=f"{file}, in bfloat16,")
    return "pt"


def _read_zarr(file: Path) -> Iterator[LabeledRows]:
    """Read about 8,192 rows at a time, in whole chunks: each chunk is decompressed once."""
    zarr = import_optional("zarr", extra="dask", user=str(file))

    try:
        array = zarr.open_array(file, mode="r")
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise FileFormatError(f"{file}: expected a Zarr array of numbers, got {error}") from error
    _check_rows(str(file), tuple(array.shape))
    chunk = int(array.chunks[0])
    step = max(1, ROWS_AT_A_TIME // chunk) * chunk
    for start in range(0, array.shape[0], step):
        rows = np.asarray(array[start : start + step])
        yield label_of(None, start, rows), rows


_READERS: dict[str, Callable[[Path], Iterator[LabeledRows]]] = {
    ".npy": _read_npy,
    ".zarr": _read_zarr,
}
#: Readers of files of several arrays or columns.
_NAMED_READERS = {".safetensors": _read_safetensors, **NAMED_READERS}
_SUFFIXES = [".npy", ".safetensors", ".zarr", *NAMED_READERS]
_LISTED = ", ".join(_SUFFIXES[:-1]) + " or " + _SUFFIXES[-1]
