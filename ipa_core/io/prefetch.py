"""Prefetch of files that are about to be read."""

from __future__ import annotations

import os
from pathlib import Path

# Bytes of the next file to prefetch, and bytes of one call: Linux silently cuts a longer request
# down to the device's readahead.
_PREFETCH_BYTES, _ADVICE_BYTES = 128 << 20, 1 << 20


def prefetch(file: Path, start: int = 0, size: int = _PREFETCH_BYTES) -> None:
    """Prefetch part of a file (``posix_fadvise``); a no-op where unsupported."""
    if not (hasattr(os, "posix_fadvise") and file.is_file()):
        return
    with file.open("rb") as raw:
        for offset in range(start, min(start + size, file.stat().st_size), _ADVICE_BYTES):
            os.posix_fadvise(raw.fileno(), offset, _ADVICE_BYTES, os.POSIX_FADV_WILLNEED)
