"""Atomic writer of files, for all packages."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from ipa_core.errors import PathError
from ipa_core.io.paths import output_path


def replace_file(path: Any, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically: a reader sees the old file or the new one.

    A new file has the permissions that the umask gives it; an existing file keeps its permissions.

    Raises
    ------
    PathError
        If the path is not that of a regular file or a new name, or the file cannot be written.
    """
    target = output_path(path)
    scratch, handle = _create_scratch(target)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, scratch)
        os.replace(scratch, target)
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise PathError(f"{target}: expected to write the file, got {error}") from error
        raise


def _create_scratch(target: Path) -> tuple[Path, int]:
    """Create an empty file beside ``target``; return its path and descriptor."""
    name = os.fsdecode(os.fsencode(target.name)[:200])
    scratch = target.with_name(f".{name}.{secrets.token_hex(8)}")
    try:
        return scratch, os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except OSError as error:
        raise PathError(
            f"{target}: expected a folder that may be written to, got {error.strerror}; "
            "choose another folder"
        ) from error


def check_writable(path: Any) -> Path:
    """Return the `output_path`, after a file was created next to it and removed again.

    Raises
    ------
    PathError
        If the file cannot be written.
    """
    target = output_path(path)
    scratch, handle = _create_scratch(target)
    try:
        os.close(handle)
    finally:
        scratch.unlink()
    return target
