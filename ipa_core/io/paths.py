"""Paths of files: checks before reading and writing."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ipa_core.errors import MissingFileError, PathError


def as_path(path: Any) -> Path:
    """Return a path with a leading ``~`` expanded.

    Raises
    ------
    PathError
        If this is neither a string nor a path-like object of one, or is empty.
    """
    text = path if isinstance(path, str) else getattr(path, "__fspath__", lambda: None)()
    if not isinstance(text, str) or not text or "\0" in text:
        raise PathError(
            "expected a path, a string or pathlib.Path that is not empty and has no null "
            f"characters, got {path!r:.80}"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise PathError(f"{text}: expected a home folder for '~', got none") from error


def input_path(path: Any) -> Path:
    """Return the path of an existing regular file or folder.

    Raises
    ------
    MissingFileError
        If there is none.
    PathError
        If the path leads to a device, pipe or socket, or cannot be followed.
    """
    source = as_path(path)
    mode = _mode(source)
    if mode is None:
        raise MissingFileError(f"{source}: expected a file or folder, got no such path")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise PathError(f"{source}: expected a file or folder, got a {_kind(mode)}")
    return source


def input_file(path: Any) -> Path:
    """Return the path of an existing regular file; raise as `input_path`, and for a folder."""
    source = input_path(path)
    if source.is_dir():
        raise PathError(f"{source}: expected a file, got a folder")
    return source


def read_file(path: Any) -> bytes:
    """Return the bytes of an existing regular file.

    Raises
    ------
    PathError
        As `input_file`, or if the file cannot be read.
    """
    source = input_file(path)
    try:
        return source.read_bytes()
    except OSError as error:
        raise PathError(f"{source}: expected a file that can be read, got {error}") from error


def output_path(path: Any) -> Path:
    """Return the file to which a write to ``path`` goes: a regular file or a new name.

    Links are followed, so that a link to a file stays a link.

    Raises
    ------
    PathError
        If the path is that of anything else (a folder, device, pipe or socket, or a link to such),
        if the file is read-only, or its folder does not exist.
    """
    given = _output(path, stat.S_ISREG, "a regular file")
    if given.exists() and not os.access(given, os.W_OK):
        raise PathError(f"{given}: expected a file that may be written, got a read-only file")
    target = _resolved(given)
    if not target.parent.is_dir():
        raise PathError(f"{given}: expected the folder {target.parent} to exist, got none; make it")
    return target


def output_folder_path(path: Any) -> Path:
    """Return the folder to which a write to ``path`` goes: a folder or a new name, links followed.

    Raises
    ------
    PathError
        If the path is that of anything else.
    """
    return _resolved(_output(path, stat.S_ISDIR, "a folder"))


def _output(path: Any, is_allowed: Callable[[int], bool], form: str) -> Path:
    """Return a path that is new, or of what may be written to."""
    given = as_path(path)
    mode = _mode(given)
    if mode is not None and not is_allowed(mode):
        raise PathError(
            f"{given}: expected {form} or a new name to write to, got a {_kind(mode)}; "
            "choose another name"
        )
    return given


def output_folder(path: Any) -> Path:
    """Return the path of a folder, which is made if missing.

    Raises
    ------
    PathError
        If the path is that of anything else, or the folder cannot be made.
    """
    folder = as_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PathError(f"{folder}: expected a folder or a new name, got {error}") from error
    return folder


def _resolved(path: Path) -> Path:
    """Return the path that links lead to."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise PathError(f"{path}: expected a path to write to, got {error}") from error


def _mode(path: Path) -> int | None:
    """Return the mode of what a path leads to, None if there is nothing."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise PathError(f"{path}: expected a path that can be followed, got {error}") from error


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "folder",
        stat.S_IFREG: "file",
        stat.S_IFIFO: "pipe",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "device",
        stat.S_IFBLK: "device",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")
