"""Communication of bytes between the ranks of a process group."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import distributed

ProcessGroup: TypeAlias = "distributed.ProcessGroup"


class Communicator:
    """Communicator of bytes between the ranks of a process group.

    gloo sends from host memory, NCCL from the current GPU.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.rank = distributed.get_rank(group)
        self.world_size = distributed.get_world_size(group)
        backends = str(distributed.get_backend_config(group))
        gpu_only = "nccl" in backends and "gloo" not in backends
        self._device = torch.device("cuda" if gpu_only else "cpu")

    def send(self, to: int, data: bytes) -> None:
        """Send bytes to a rank, which must call `receive`."""
        to = distributed.get_global_rank(self._group, to)
        distributed.send(self._number(len(data)), to, self._group)
        distributed.send(self._tensor(data), to, self._group)

    def receive(self, source: int) -> bytes:
        """Return the bytes that a rank sends."""
        source = distributed.get_global_rank(self._group, source)
        size = self._number(0)
        distributed.recv(size, source, self._group)
        data = self._empty(int(size))
        distributed.recv(data, source, self._group)
        return _bytes(data)

    def broadcast(self, source: int, data: bytes | None) -> bytes:
        """Return the bytes of the source rank on all ranks; the others pass None."""
        origin = distributed.get_global_rank(self._group, source)
        size = self._number(0 if data is None else len(data))
        distributed.broadcast(size, origin, self._group)
        content = self._empty(int(size)) if data is None else self._tensor(data)
        distributed.broadcast(content, origin, self._group)
        return _bytes(content) if data is None else data

    def gather(self, data: bytes) -> list[bytes]:
        """Return the bytes of all ranks, in their order, on all ranks."""
        sizes = [self._number(0) for _ in range(self.world_size)]
        distributed.all_gather(sizes, self._number(len(data)), self._group)
        most = max(int(size) for size in sizes)
        parts = [self._empty(most) for _ in sizes]
        padded = self._tensor(data + bytes(most - len(data)))
        distributed.all_gather(parts, padded, self._group)
        return [_bytes(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

    def all_reduce_min(self, value: int) -> int:
        """Return the smallest number of all ranks."""
        number = self._number(value)
        distributed.all_reduce(number, distributed.ReduceOp.MIN, self._group)
        return int(number)

    def _number(self, value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int64, device=self._device)

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _tensor(self, data: bytes) -> torch.Tensor:
        if not data:
            return self._empty(0)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)


def _bytes(content: torch.Tensor) -> bytes:
    return content.cpu().numpy().tobytes()
