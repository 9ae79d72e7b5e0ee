"""Random state of torch on the host, read and set by one thread at a time.

Two threads that read it at once may wait for each other without end: torch holds the generator's
mutex while it waits for the interpreter's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.RLock()


def get_random_state() -> torch.Tensor:
    """Return the state, as `torch.get_rng_state` does."""
    with _LOCK:
        return torch.get_rng_state()


def set_random_state(state: torch.Tensor) -> None:
    """Set the state, as `torch.set_rng_state` does."""
    with _LOCK:
        torch.set_rng_state(state)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the state at the end, as `torch.random.fork_rng([])` does."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)
