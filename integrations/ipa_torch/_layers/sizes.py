"""Numbers of input and output features of a layer."""

from __future__ import annotations

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
        weight: torch.Tensor = layer.weight
        return weight[0].numel(), layer.out_channels
    if is_conv1d(layer):
        rows, columns = layer.get_parameter("weight").shape
        return rows, columns
    features, outputs = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if not (isinstance(features, int) and isinstance(outputs, int)):
        raise LayerError(
            f"expected a layer with in_features and out_features, got {type(layer).__name__}; "
            "leave it out of the targets"
        )
    return features, outputs
