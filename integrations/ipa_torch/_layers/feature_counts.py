"""Numbers of input and output features of a layer."""

from __future__ import annotations

import math

import torch
from torch import nn

from ipa_torch._layers.matmul_view import Convolution
from ipa_torch._layers.unwrap import is_conv1d, unwrap_layer
from ipa_torch.errors import LayerError


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
