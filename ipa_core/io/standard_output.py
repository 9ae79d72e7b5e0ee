"""Standard output of commands: full disks and readers that have gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def flushed_output() -> Iterator[None]:
    """Flush standard output at the end; after an error of it, discard what it cannot take.

    Otherwise Python flushes it again when it exits, and prints a second error.

    Raises
    ------
    OSError
        If standard output takes no more; `BrokenPipeError` if its reader has gone, as `head` does.
    """
    try:
        yield
        _flush()
    except OSError:
        try:
            _flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _flush() -> None:
    print(end="", flush=True)
