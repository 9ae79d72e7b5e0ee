"""Readers of activation streams: arrays, iterables, loaders and files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open

from ipa_core._array import Array, is_array
from ipa_core.errors import FileFormatError, MissingDependencyError, StreamError
from ipa_core.io import _formats
from ipa_core.io._formats import ROWS_AT_A_TIME, split_key
from ipa_core.io._frames import frame_blocks, is_frame
from ipa_core.io._sparse import dense_blocks, is_sparse

Batch: TypeAlias = "Array | tuple[Array, Array]"
ActivationStream: TypeAlias = "Array | Iterable[Batch | str | PathLike[str]] | str | PathLike[str]"

# Bytes of the next file to prefetch, and bytes of one call: Linux silently cuts a longer request
# down to the device's readahead.
_PREFETCH_BYTES, _ADVICE_BYTES = 128 << 20, 1 << 20


def iterate(stream: ActivationStream) -> Iterator[tuple[Array, Array | None]]:
    """Yield (batch, weights or None) from an activation stream.

    Parameters
    ----------
    stream : array, iterable or path
        An array of shape (..., features), memory-mapped or not, of the array API or with
        ``__dlpack__``; a sparse matrix or array of SciPy, made dense in blocks of 8 MB (float32);
        an iterable (list, generator, ``DataLoader``) of such arrays, of pairs
        (batch, weights) or of paths; a data frame of pandas or Polars; a ``.npy`` file, a
        ``.npz``, ``.safetensors``, ``.h5`` or ``.hdf5`` file (each array a batch), a ``.zarr``
        array, a ``.parquet``, ``.arrow`` or ``.feather`` file (a column of lists is the rows, or
        each column a feature), or a folder of them, read in the order of their names, at most
        8,192 rows at a time. ``FILE#NAME`` reads one array or column of a file.

    Raises
    ------
    StreamError
        If the object, or an item of it, is none of these.
    FileFormatError
        If a file is damaged or of another kind.

    Examples
    --------
    >>> import numpy as np
    >>> [batch.shape for batch, _ in iterate([np.ones((2, 3)), (np.ones((1, 3)), np.ones(1))])]
    [(2, 3), (1, 3)]
    """
    if isinstance(stream, (str, PathLike)):
        yield from _read_path(Path(stream))
    elif is_sparse(stream) or is_frame(stream):
        yield from _blocks(stream, None)
    elif _is_arraylike(stream):
        yield from _cut(_as_array(stream))
    elif isinstance(stream, Iterable):
        for number, item in enumerate(stream):
            if isinstance(item, (str, PathLike)):
                yield from _read_path(Path(item))
            else:
                yield from _blocks(*_pair(item, number))
    else:
        raise StreamError(
            "expected an array, an iterable of batches or a path as activation stream, "
            f"got {type(stream).__name__}"
        )


def is_one_shot(stream: object) -> bool:
    """Return whether the stream can be read only once, as a generator."""
    return hasattr(stream, "__next__")


def _is_arraylike(value: object) -> bool:
    return (
        is_array(value)
        or hasattr(value, "__dlpack__")
        or hasattr(value, "to_numpy")
        or is_sparse(value)
    )


def _as_array(value: Any) -> Array:
    if is_array(value) or is_sparse(value) or is_frame(value):
        return value
    # A column of a frame holds weights.
    return value.to_numpy() if hasattr(value, "to_numpy") else np.from_dlpack(value)


def _blocks(batch: Array, weights: Array | None) -> Iterator[tuple[Array, Array | None]]:
    """Yield a batch in blocks, if it is a frame or a sparse matrix; else as it is."""
    if is_sparse(batch):
        yield from dense_blocks(batch, weights, ROWS_AT_A_TIME)
    elif is_frame(batch):
        yield from frame_blocks(batch, weights, ROWS_AT_A_TIME)
    else:
        yield batch, weights


def _pair(item: Batch, number: int) -> tuple[Array, Array | None]:
    if _is_arraylike(item):
        return _as_array(item), None
    if isinstance(item, (tuple, list)) and 1 <= len(item) <= 2 and all(map(_is_arraylike, item)):
        batch, *weights = map(_as_array, item)
        return batch, weights[0] if weights else None
    raise StreamError(
        f"expected batch {number} to be an array or a pair (batch, weights), "
        f"got {type(item).__name__}"
    )


def _cut(array: Array) -> Iterator[tuple[Array, None]]:
    """Cut an array along its first axis, so that a memory-mapped file is never read whole."""
    if array.ndim < 2:
        yield array, None
        return
    for start in range(0, array.shape[0], ROWS_AT_A_TIME):
        yield array[start : min(start + ROWS_AT_A_TIME, array.shape[0]), ...], None


def _read_path(path: Path) -> Iterator[tuple[Array, None]]:
    path, key = split_key(path)
    files = files_of(path)
    for file, following in zip(files, [*files[1:], None], strict=True):
        if following is not None:
            prefetch(following)
        yield from _read(file, key)


def prefetch(file: Path, start: int = 0, size: int = _PREFETCH_BYTES) -> None:
    """Prefetch part of a file (``posix_fadvise``); a no-op where unsupported."""
    if not (hasattr(os, "posix_fadvise") and file.is_file()):
        return
    with file.open("rb") as raw:
        for offset in range(start, min(start + size, file.stat().st_size), _ADVICE_BYTES):
            os.posix_fadvise(raw.fileno(), offset, _ADVICE_BYTES, os.POSIX_FADV_WILLNEED)


def files_of(path: Path) -> list[Path]:
    """Return the files of a folder, sorted by name; a file or a Zarr array gives itself.

    Raises
    ------
    StreamError
        If the folder has no such files, or holds an `ActivationStore` of several layers.
    """
    if not path.is_dir() or path.suffix == ".zarr":
        return [path]
    if (path / "index.json").exists():
        raise StreamError(
            f"expected activations of one layer in the folder {path}, got an activation store of "
            "several; read a layer with ipa_core.ActivationStore(folder)[name]"
        )
    files = sorted(file for file in path.iterdir() if file.suffix in _ALL_SUFFIXES)
    if not files:
        raise StreamError(f"expected {_SUFFIXES} files in the folder {path}, got none")
    return files


def _read(file: Path, key: str | None = None) -> Iterator[tuple[Array, None]]:
    if file.suffix in _formats.READERS:
        yield from _formats.READERS[file.suffix](file, key)
    elif file.suffix == ".safetensors":
        yield from _read_safetensors(file, key)
    elif file.suffix in _READERS and key is None:
        yield from _READERS[file.suffix](file)
    else:
        raise StreamError(
            f"expected a {_SUFFIXES} file or a folder of them, got {file}; "
            "save the activations with numpy.save or safetensors"
        )


def _read_npy(file: Path) -> Iterator[tuple[Array, None]]:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise FileFormatError(f"{file}: expected a .npy file of numbers, got {error}") from error
    prefetch(file)
    start = array.offset
    for batch, weights in _cut(array):
        start += batch.nbytes
        prefetch(file, start, batch.nbytes)
        yield batch, weights


def _read_safetensors(file: Path, key: str | None) -> Iterator[tuple[Array, None]]:
    try:
        with safe_open(file, framework=_framework(file)) as tensors:
            for name in _formats.chosen(file, [*tensors.keys()], key):
                rows = tensors.get_slice(name)
                _formats.check_rows(file, name, rows.get_shape(), rows.get_dtype())
                count = rows.get_shape()[0]
                for start in range(0, count, ROWS_AT_A_TIME):
                    batch = rows[start : min(start + ROWS_AT_A_TIME, count)]
                    # bfloat16 comes as a torch tensor; the stream is NumPy for every dtype.
                    yield (batch.float().numpy() if hasattr(batch, "numpy") else batch), None
    except SafetensorError as error:
        raise FileFormatError(f"{file}: expected a safetensors file, got {error}") from error


def _framework(file: Path) -> str:
    """Return the safetensors framework for the file's dtypes: NumPy has no bfloat16."""
    with safe_open(file, framework="numpy") as tensors:
        if all(tensors.get_slice(key).get_dtype() != "BF16" for key in tensors.keys()):
            return "numpy"
    if find_spec("torch") is None:
        raise MissingDependencyError(
            f"{file}: expected torch to be installed, which reads bfloat16; "
            "run pip install 'ipa-projectors[torch]'"
        )
    return "pt"


def _read_zarr(file: Path) -> Iterator[tuple[Array, None]]:
    """Read about 8,192 rows at a time, in whole chunks: each chunk is decompressed once."""
    if find_spec("zarr") is None:
        raise MissingDependencyError(
            f"{file}: expected zarr to be installed; run pip install 'ipa-projectors[dask]'"
        )
    import zarr

    try:
        array = zarr.open_array(file, mode="r")
    except (ValueError, KeyError, TypeError, OSError) as error:
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such Zarr array") from error
        raise FileFormatError(f"{file}: expected a Zarr array of numbers, got {error}") from error
    chunk = int(array.chunks[0])
    step = max(1, ROWS_AT_A_TIME // chunk) * chunk
    for start in range(0, array.shape[0], step):
        yield np.asarray(array[start : start + step]), None


_READERS: dict[str, Callable[[Path], Iterator[tuple[Array, None]]]] = {
    ".npy": _read_npy,
    ".zarr": _read_zarr,
}
_ALL_SUFFIXES = [".npy", ".safetensors", ".zarr", *_formats.READERS]
_SUFFIXES = ", ".join(_ALL_SUFFIXES[:-1]) + " or " + _ALL_SUFFIXES[-1]
