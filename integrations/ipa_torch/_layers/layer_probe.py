"""Run of a copy of a layer on probe inputs."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ipa_torch._layers.conv_view import ConvView
from ipa_torch._layers.layer_properties import features_of
from ipa_torch._layers.matmul_view import MatmulView
from ipa_torch._layers.random_state import kept_random_state


def probe_inputs(
    view: MatmulView, layer: nn.Module, generator: torch.Generator, like: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Yield inputs of the shapes that a layer may want: a half of their rows is large."""
    if isinstance(view, ConvView):
        steps = zip(view.kernel, view.dilation, view.stride, strict=True)
        sizes = [2 * (d * (k - 1) + 1) + step for k, d, step in steps]
        channels = features_of(layer) * view.groups // math.prod(view.kernel)
        shapes: list[tuple[int, ...]] = [(2, channels, *sizes)]
    else:
        features = features_of(layer)
        shapes = [(2, 3, features), (6, features)]
    for shape in shapes:
        x = torch.randn(shape, generator=generator, device="cpu")
        x[1::2] *= 100
        yield x.to(like.device, like.dtype)


def output_of_copy(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor | None) -> Any:
    """Return the output of a copy of a layer in evaluation mode, with another weight.

    The layer's hooks are left out: they act on the adapted layer, and may record what they see.
    """
    twin = _evaluating_copy(layer)
    twin._forward_pre_hooks, twin._forward_hooks = OrderedDict(), OrderedDict()
    if weight is not None:
        twin._parameters = {
            **twin._parameters,
            "weight": nn.Parameter(weight, requires_grad=False),
        }
    with kept_random_state():
        return twin(x)


def _evaluating_copy(module: nn.Module) -> nn.Module:
    """Return a copy that shares all tensors; a forward of the instance stays that of the layer."""
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {
        key: None if child is None else _evaluating_copy(child)
        for key, child in module._modules.items()
    }
    return twin
