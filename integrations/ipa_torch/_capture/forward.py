"""Forward pass of a batch, and devices of models and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import nn

Forward: TypeAlias = Callable[[nn.Module, Any], object]


def default_forward(model: nn.Module, batch: Any) -> None:
    """Call a model with a batch: keywords of a mapping, items of a tuple or list, or the batch."""
    batch = on_device(batch, device_of(model))
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, (tuple, list)):
            model(*batch)
        else:
            model(batch)
    except TypeError as error:
        # Most often a loader of (input, label) pairs and a model of inputs only.
        error.add_note(
            "The model was called with the batch: a mapping as keywords, a tuple or list by "
            "position. Pass forward=lambda model, batch: ... for another call."
        )
        raise


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the first tensor that is not on the meta device; None without any.

    Offloaded weights are on the meta device until their layer runs.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if not tensor.is_meta:
            return tensor.device
    return None


def on_device(batch: Any, device: torch.device | None) -> Any:
    """Return a batch with its tensors, also nested ones, on ``device``."""
    if isinstance(batch, torch.Tensor):
        # A copy to the host must be synchronous.
        return batch if device is None else batch.to(device, non_blocking=device.type != "cpu")
    if isinstance(batch, Mapping):
        return {key: on_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [on_device(value, device) for value in batch]
    return batch
