"""Activation streams: batches from arrays, iterables, loaders and files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, TypeAlias

import numpy as np

from ipa_core._array import Array, check_array, conversion_hint, is_array
from ipa_core._sparse_rows import is_sparse
from ipa_core.errors import ArrayTypeError, StreamError
from ipa_core.io._data_frames import frame_blocks, is_frame
from ipa_core.io._formats.array_blocks import ROWS_AT_A_TIME, read_in_blocks
from ipa_core.io._sparse_blocks import dense_blocks, sparse_blocks
from ipa_core.io.activation_files import read_path
from ipa_core.io.activation_store import ActivationStore

Batch: TypeAlias = "Array | tuple[Array, Array]"
ActivationStream: TypeAlias = "Array | Iterable[Batch | str | PathLike[str]] | str | PathLike[str]"
LabeledBatch: TypeAlias = tuple[str, Array, "Array | None"]


def iterate(stream: ActivationStream) -> Iterator[tuple[Array, Array | None]]:
    """Yield (batch, weights or None) from an activation stream.

    Parameters
    ----------
    stream : array, iterable or path
        An array of shape (..., features), memory-mapped or not, of the array API or with
        ``__dlpack__``; a sparse matrix or array of SciPy, in blocks of rows;
        an iterable (list, generator, ``DataLoader``) of such arrays, of pairs
        (batch, weights) or of paths; a data frame of pandas or Polars; a ``.npy`` file, a
        ``.npz``, ``.safetensors``, ``.h5`` or ``.hdf5`` file (each array a batch), a ``.zarr``
        array, a ``.parquet``, ``.arrow`` or ``.feather`` file (a column of lists is the rows, or
        each column a feature), or a folder of them, read in the order of their names, at most
        8,192 rows at a time. ``FILE#NAME`` reads one array or column of a file. Arrays in files
        have two axes or more.

    Raises
    ------
    StreamError
        If the object, or an item of it, is none of these.
    FileFormatError, ShapeError, ArrayTypeError
        If a file is damaged, of another kind, or holds other arrays than rows; names the file.
    PathError
        If a file cannot be read; a `MissingFileError` if there is none.

    Examples
    --------
    >>> import numpy as np
    >>> [batch.shape for batch, _ in iterate([np.ones((2, 3)), (np.ones((1, 3)), np.ones(1))])]
    [(2, 3), (1, 3)]
    """
    for _, batch, weights in labeled_batches(stream):
        yield batch, weights


def labeled_batches(stream: ActivationStream, keep_sparse: bool = False) -> Iterator[LabeledBatch]:
    """Yield (label, batch, weights or None), with the batch's number, or its file and rows.

    Sparse rows become dense blocks, or remain sparse, for a learner, with ``keep_sparse``.
    """
    if isinstance(stream, (str, PathLike)):
        yield from _read(stream)
    elif is_sparse(stream) or is_frame(stream):
        yield from _blocks(stream, None, keep_sparse)
    elif callable(labeled := getattr(stream, "labeled_batches", None)):
        yield from labeled()
    elif _is_arraylike(stream):
        array = _as_array(stream)
        check_array(array)  # sparse and nested tensors cannot be cut
        for label, batch in read_in_blocks(array):
            yield label or "batch 0", batch, None
    else:
        yield from _items(_check_iterable(stream), keep_sparse)


def is_one_shot(stream: object) -> bool:
    """Return whether the stream can be read only once, as a generator."""
    return hasattr(stream, "__next__")


def _items(stream: Iterable[Any], keep_sparse: bool) -> Iterator[LabeledBatch]:
    for number, item in enumerate(stream):
        label = f"batch {number}"
        if isinstance(item, (str, PathLike)):
            yield from _read(item)
            continue
        batch, weights = _pair(item, label)
        if is_sparse(batch) or is_frame(batch):
            for rows, block, block_weights in _blocks(batch, weights, keep_sparse):
                yield f"{label}, {rows}", block, block_weights
        else:
            yield label, batch, weights


def _read(path: str | PathLike[str]) -> Iterator[LabeledBatch]:
    for label, batch in read_path(path):
        yield label, batch, None


def _blocks(batch: Any, weights: Array | None, keep_sparse: bool) -> Iterator[LabeledBatch]:
    """Yield a frame or a sparse matrix as blocks."""
    of_matrix = sparse_blocks if keep_sparse else dense_blocks
    cut, start = of_matrix if is_sparse(batch) else frame_blocks, 0
    for block, block_weights in cut(batch, weights, ROWS_AT_A_TIME):
        end = start + block.shape[0]
        yield f"rows {start:,} to {end - 1:,}", block, block_weights
        start = end


def _check_iterable(stream: Any) -> Iterable[Any]:
    """Return the stream if it is an iterable of batches, as far as its type tells."""
    cure = _cure(stream)
    if cure is None and isinstance(stream, Iterable):
        if not _is_weighted_pair(stream):
            return stream
        cure = "pass a pair of rows and weights as a stream of one batch, [(X, weights)]"
    got = type(stream).__name__ + (f"; {cure}" if cure else "")
    raise StreamError(
        f"expected an array, an iterable of batches or a path as activation stream, got {got}"
    )


def _cure(value: Any) -> str | None:
    """Return how to make a stream or a batch of an object that only looks like it."""
    if isinstance(value, ActivationStore):
        return "read a layer of the store, store[name]"
    if isinstance(value, Mapping):
        return "pass the array or stream of a single key, value[name]"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "pass a path as a string or pathlib.Path, os.fsdecode(value)"
    if hasattr(value, "read") and hasattr(value, "fileno"):
        return "pass the path of a file, not an open file"
    return conversion_hint(value)


def _is_weighted_pair(stream: Any) -> bool:
    """Return whether the stream is a pair (X, weights) rather than two batches."""
    if not isinstance(stream, (tuple, list)) or len(stream) != 2:
        return False
    if not all(map(_is_arraylike, stream)):
        return False
    batch, weights = map(_as_array, stream)
    return len(batch.shape) > 1 and tuple(weights.shape) == tuple(batch.shape[:-1])


def _is_arraylike(value: Any) -> bool:
    if is_sparse(value):
        return True
    known = is_array(value) or hasattr(value, "__dlpack__") or hasattr(value, "to_numpy")
    return known and not (hasattr(value, "__dask_graph__") or isinstance(value, type))


def _as_array(value: Any) -> Array:
    if is_array(value) or is_sparse(value) or is_frame(value):
        return value
    try:
        # A column of a frame holds weights.
        return value.to_numpy() if hasattr(value, "to_numpy") else np.from_dlpack(value)
    except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as error:
        raise ArrayTypeError(
            f"expected an array on the host, got a {type(value).__name__} that NumPy cannot read: "
            f"{error}"
        ) from error


def _pair(item: Any, label: str) -> tuple[Array, Array | None]:
    if _is_arraylike(item):
        return _as_array(item), None
    if isinstance(item, (tuple, list)) and 1 <= len(item) <= 2 and all(map(_is_arraylike, item)):
        batch, *weights = map(_as_array, item)
        return batch, weights[0] if weights else None
    cure = _cure(item)
    raise StreamError(
        f"expected {label} to be an array or a pair (batch, weights), "
        f"got {type(item).__name__}" + (f"; {cure}" if cure else "")
    )
