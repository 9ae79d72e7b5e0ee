"""What autograd keeps for the backward pass."""

from collections.abc import Callable

import torch
from torch import nn


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
