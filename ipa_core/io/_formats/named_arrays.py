"""Names of the arrays in a file, and labels of their rows."""

from __future__ import annotations

from pathlib import Path

from ipa_core._array import Array
from ipa_core.errors import FileFormatError


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


def label_of(key: str | None, start: int, rows: Array) -> str:
    """Return the words for a block of rows of a file: its array or column, and its rows."""
    place = f"rows {start:,} to {start + rows.shape[0] - 1:,}"
    return place if key is None else f"{key!r}, {place}"
