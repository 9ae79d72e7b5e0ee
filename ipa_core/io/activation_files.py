"""Reader of activation files of any format, and of folders of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ipa_core.caller_warnings import warn_caller
from ipa_core.errors import FileFormatError, IPAError, PathError, StreamError
from ipa_core.io._formats.array_blocks import LabeledRows
from ipa_core.io._formats.arrow import read_arrow
from ipa_core.io._formats.hdf5 import read_hdf5
from ipa_core.io._formats.named_arrays import split_key
from ipa_core.io._formats.numpy_files import read_npy, read_npz
from ipa_core.io._formats.safetensors_files import read_safetensors
from ipa_core.io._formats.zarr_arrays import read_zarr
from ipa_core.io.paths import as_path, input_path
from ipa_core.io.prefetch import prefetch

#: Readers of files of a single array.
_READERS: dict[str, Callable[[Path], Iterator[LabeledRows]]] = {
    ".npy": read_npy,
    ".zarr": read_zarr,
}
#: Readers of files of several arrays or columns.
_NAMED_READERS: dict[str, Callable[[Path, str | None], Iterator[LabeledRows]]] = {
    ".safetensors": read_safetensors,
    ".npz": read_npz,
    ".h5": read_hdf5,
    ".hdf5": read_hdf5,
    ".parquet": read_arrow,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
_SUFFIXES = [*_READERS, *_NAMED_READERS]
_LISTED = ", ".join(_SUFFIXES[:-1]) + " or " + _SUFFIXES[-1]


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
        warn_caller(f"{source}: skipped {names}, which hold no activations")
    return files


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
    except Exception as error:  # of a format's library, by a damaged file
        raise FileFormatError(
            f"{file}: expected a {file.suffix} file of numbers, got {type(error).__name__}: {error}"
        ) from error
