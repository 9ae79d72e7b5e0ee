"""Properties of a layer: its type, and its numbers of input and output features."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import nn

from ipa_torch._layers.unwrap import unwrap_layer
from ipa_torch.errors import LayerError

#: Classes of torch that compute W x + b.
_STOCK = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


def is_conv1d(layer: nn.Module) -> bool:
    """Return whether a layer is transformers' ``Conv1D``: linear, with a transposed weight.

    Known by its name, as transformers may not be installed.
    """
    return type(layer).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, as far as its class and attributes show.

    These are ``nn.Linear``, transformers' ``Conv1D``, layers that wrap them as ``base_layer``, and
    modules with ``in_features`` that contain neither another such module nor a convolution:
    quantized layers are of a dozen classes of as many packages.
    """
    module = unwrap_layer(module)
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    return named_sizes(module) is not None and not any(
        named_sizes(inner) is not None or isinstance(inner, Convolution)
        for inner in module.modules()
        if inner is not module
    )


def is_stock(layer: nn.Module) -> bool:
    """Return whether a layer computes as the class of torch does: no hook, no forward of its own.

    Examples
    --------
    >>> is_stock(nn.Linear(4, 2)), is_stock(nn.LayerNorm(4))
    (True, False)
    """
    changed = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) in _STOCK and not changed


def features_of(layer: nn.Module) -> int:
    """Return the number of features of a layer's input rows.

    Raises
    ------
    LayerError
        If the layer does not have them as attributes.
    """
    return _sizes(layer)[0]


def outputs_of(layer: nn.Module) -> int:
    """Return the number of features of a layer's output rows."""
    return _sizes(layer)[1]


def _sizes(layer: nn.Module) -> tuple[int, int]:
    layer = unwrap_layer(layer)
    if isinstance(layer, Convolution):
        channels = layer.in_channels // layer.groups
        return channels * math.prod(layer.kernel_size), layer.out_channels
    if is_conv1d(layer):
        rows, columns = layer.get_parameter("weight").shape
        return rows, columns
    if (sizes := named_sizes(layer)) is None:
        raise LayerError(
            "expected a layer with in_features and out_features, or with in_channels, "
            f"out_channels and a weight of that shape, got {type(layer).__name__}; leave it out of "
            "the targets"
        )
    return sizes


def named_sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Return the numbers that a layer has as attributes; None if it is not linear by them.

    Graph libraries name them in_channels and out_channels, as convolutions do: these count where
    the weight is a matrix of that shape.

    Examples
    --------
    >>> named_sizes(nn.Linear(4, 2)), named_sizes(nn.LayerNorm(4))
    ((4, 2), None)
    """
    sizes = _integers(layer, "in_features", "out_features")
    if sizes is not None:
        return sizes
    sizes = _integers(layer, "in_channels", "out_channels")
    weight = getattr(layer, "weight", None)
    fits = (
        sizes is not None
        and isinstance(weight, torch.Tensor)
        and tuple(weight.shape) == sizes[::-1]
    )
    return sizes if fits else None


def _integers(layer: nn.Module, first: str, second: str) -> tuple[int, int] | None:
    before, after = getattr(layer, first, None), getattr(layer, second, None)
    return (before, after) if isinstance(before, int) and isinstance(after, int) else None
