"""How a batch gets into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import nn

Forward: TypeAlias = Callable[[nn.Module, Any], object]


def default_forward(model: nn.Module, batch: Any) -> None:
    """Call a model: a mapping gives keywords, a tuple or list positions, all else one argument."""
    batch = on_device(batch, device_of(model))
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, (tuple, list)):
            model(*batch)
        else:
            model(batch)
    except TypeError as error:
        # Most often a loader of (input, label) pairs and a model that takes inputs alone.
        error.add_note(
            "The model was called with the batch: a mapping as keywords, a tuple or list by "
            "position. Pass forward=lambda model, batch: ... to call it in another way."
        )
        raise


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the first tensor that is somewhere; None if there is none.

    Weights that are loaded when they are needed are on the meta device until then.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if not tensor.is_meta:
            return tensor.device
    return None


def on_device(batch: Any, device: torch.device | None) -> Any:
    """Return a batch with its tensors on ``device``, whatever they are nested in."""
    if isinstance(batch, torch.Tensor):
        # A copy to the host has to be waited for.
        return batch if device is None else batch.to(device, non_blocking=device.type != "cpu")
    if isinstance(batch, Mapping):
        return {key: on_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [on_device(value, device) for value in batch]
    return batch
