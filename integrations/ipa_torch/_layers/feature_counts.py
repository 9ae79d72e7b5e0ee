"""Numbers of input and output features of a layer."""

from __future__ import annotations

import math

from torch import nn

from ipa_torch._layers.layer_type import Convolution, is_conv1d, named_sizes
from ipa_torch._layers.unwrap import unwrap_layer
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
