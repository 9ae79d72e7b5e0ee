"""Lock of a folder that a single run may write to."""

from __future__ import annotations

import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ipa_core.errors import SettingError
from ipa_core.io.paths import output_folder

#: Name of the locked file.
LOCK = ".lock"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created if missing, and removed if it stays empty.

    The system releases the lock when the process ends, also by a kill.

    Raises
    ------
    SettingError
        If another run has it; the message names its process and machine.
    PathError
        If the folder cannot be made.

    Warns
    -----
    UserWarning
        If the file system has no locks.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, lock_folder(Path(folder)):
    ...     print((Path(folder) / ".lock").read_text().split()[0])
    process
    """
    is_new = not os.path.exists(folder)
    output_folder(folder)
    file = _locked_file(folder)
    if file is None:
        yield
        return
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            if is_new:
                _remove_empty(folder)
            _unlock(file)


def _remove_empty(folder: Path) -> None:
    """Remove a folder without other files than the lock."""
    with suppress(OSError):  # an open file cannot be removed on Windows
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def _locked_file(folder: Path) -> IO[str] | None:
    """Return the locked file of a folder, None where nothing can be locked."""
    file = None
    try:
        file = open(folder / LOCK, "a+", encoding="utf-8")
        _lock(file)
    except BlockingIOError as error:
        assert file is not None
        with file:
            file.seek(0)
            holder = file.read() or "a run that has just begun"
        raise SettingError(
            f"expected {folder} to be free, got one that another run writes to ({holder}); wait, "
            "or use another folder"
        ) from error
    except OSError as error:
        if file is not None:
            file.close()
        warnings.warn(
            f"{folder} cannot be locked ({error}): start no other run with it", stacklevel=4
        )
        return None
    return file


if sys.platform == "win32":
    import msvcrt

    _FAR = 1 << 30  # a locked byte cannot be read by others

    def _lock(file: IO[str]) -> None:
        file.seek(_FAR)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error

    def _unlock(file: IO[str]) -> None:
        file.seek(_FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: IO[str]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(file: IO[str]) -> None:
        # Also if a child process, such as a loader's, still has the file open.
        fcntl.flock(file, fcntl.LOCK_UN)
