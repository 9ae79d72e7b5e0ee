"""Lockstep of the ranks of a sharded model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ipa_torch._distributed.communicator import Communicator


class Lockstep:
    """Lockstep of all ranks: they exchange a number before each step.

    A rank that stops sends 0; then all ranks stop.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._over = False

    def all_reduce_min(self, value: int) -> int:
        """Return the smallest number of all ranks."""
        smallest = 0 if self._over else self._comm.all_reduce_min(value)
        self._over = not smallest
        return smallest

    def common(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches as long as every rank has another."""
        for batch in batches:
            if not self.all_reduce_min(1):
                return
            yield batch
        self.leave()

    def leave(self) -> None:
        """Stop, on all ranks."""
        self.all_reduce_min(0)
