"""Device and dtype with which a layer computes, also while its weights are offloaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ipa_core.errors import with_context
from ipa_torch.errors import LayerError


def reference_tensor(layer: nn.Module) -> torch.Tensor | None:
    """Return the tensor with the dtype of a layer, and its device unless it is offloaded."""
    if parametrize.is_parametrized(layer):
        # Reading the weight would compute it, which moves a power iteration.
        return next(layer.parameters())
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight
    tensors = (*layer.parameters(), *layer.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def check_loaded(layers: Mapping[str, nn.Module]) -> None:
    """Check that weights of at least one layer are in memory, or are loaded when it runs.

    Raises
    ------
    LayerError
        If all are on the meta device.
    """
    for number, (name, layer) in enumerate(layers.items(), start=1):
        try:
            execution_device(layer)
        except LayerError as error:
            if number == len(layers):
                raise with_context(error, f"layer {name!r}") from error
        else:
            return


def execution_device(layer: nn.Module) -> torch.device:
    """Return the device on which a layer computes.

    The weights of a layer that accelerate offloads are on the meta device until the layer runs;
    what is added to the layer belongs where they are loaded then.

    Raises
    ------
    LayerError
        If the weights are on the meta device and nothing will load them.
    """
    tensor = reference_tensor(layer)
    if tensor is None or not tensor.is_meta:
        return torch.device("cpu") if tensor is None else tensor.device
    for module in layer.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            if getattr(part, "offload", False):
                return torch.device(part.execution_device)
    raise LayerError(
        "expected a layer with weights, got one on the meta device that accelerate does not "
        "offload; load the model's weights first"
    )
