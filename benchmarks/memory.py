"""Memory saved for the backward pass, and peak memory of an action."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

_STATUS = Path("/proc/self/status")


def saved_for_backward(
    model: nn.Module, forward: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, int]:
    """Return what ``forward`` returns, and the bytes of distinct storages kept, weights apart."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    return output, sum(kept.values())


def peak_bytes(action: Callable[[], object]) -> int | None:
    """Return what an action allocates at most above what was held before it.

    On the GPU, if there is one; else in this process, which only Linux tells. There, what was freed
    before is given back first, as far as the allocator can: use a fresh process.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _STATUS.is_file():
        return None
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # in glibc
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = _peak_of_process()
    action()
    return _peak_of_process() - before


def _peak_of_process() -> int:
    lines = _STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
