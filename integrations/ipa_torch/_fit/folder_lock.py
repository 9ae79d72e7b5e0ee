"""Lock of a folder that a single run may write to."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ipa_core.caller_warnings import warn_caller
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
    lock = _FolderLock(folder)
    try:
        lock.acquire()
        yield
    finally:
        try:
            lock.release()
        except BaseException:  # an interruption
            lock.release()
            raise


class _FolderLock:
    """Lock of a folder, and of what is to be removed after it, from the first moment on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_new = not os.path.exists(folder)
        self._file: IO[str] | None = None
        self._locked = False

    def acquire(self) -> None:
        """Make the folder, and lock it where the file system can."""
        output_folder(self._folder)
        try:
            self._file = open(self._folder / LOCK, "a+", encoding="utf-8")
            _lock(self._file)
            self._locked = True
        except BlockingIOError as error:
            assert self._file is not None
            self._file.seek(0)
            holder = self._file.read() or "a run that has just begun"
            self._file.close()
            raise SettingError(
                f"expected {self._folder} to be free, got one that another run writes to "
                f"({holder}); wait, or use another folder"
            ) from error
        except OSError as error:
            warn_caller(
                f"{self._folder} cannot be locked ({error}): start no other run with it",
            )
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}")
        self._file.flush()

    def release(self) -> None:
        """Unlock the folder, and remove it if it was made here and is empty. May be repeated."""
        if self._file is not None and not self._file.closed:
            if self._holds(self._file):
                self._file.truncate(0)
                if self._is_new:
                    self._remove_file()
                _unlock(self._file)
            self._file.close()
        if self._is_new:
            with suppress(OSError):  # it is not empty
                self._folder.rmdir()

    def _holds(self, file: IO[str]) -> bool:
        """Return whether the lock was taken, also if an interruption came after it."""
        if not self._locked:
            with suppress(OSError):
                _lock(file)
                self._locked = True
        return self._locked

    def _remove_file(self) -> None:
        """Remove the file of the lock from a folder without other files."""
        with suppress(OSError):  # an open file cannot be removed on Windows
            if [path.name for path in self._folder.iterdir()] == [LOCK]:
                (self._folder / LOCK).unlink()


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
