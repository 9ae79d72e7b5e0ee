"""Features and outputs of a layer."""

from __future__ import annotations

import torch
from torch import nn

from ipa_torch._layers.matmul_view import Convolution
from ipa_torch.errors import LayerError


def features_of(layer: nn.Module) -> int:
    """Return the features of the rows that a layer multiplies.

    Raises
    ------
    LayerError
        If the layer does not tell.
    """
    return _sizes(layer)[0]


def outputs_of(layer: nn.Module) -> int:
    """Return the length of a layer's output, per place."""
    return _sizes(layer)[1]


def _sizes(layer: nn.Module) -> tuple[int, int]:
    if isinstance(base := getattr(layer, "base_layer", None), nn.Module):
        return _sizes(base)
    if isinstance(layer, Convolution):
        weight: torch.Tensor = layer.weight
        return weight[0].numel(), layer.out_channels
    if type(layer).__name__ == "Conv1D":  # of transformers
        features, outputs = layer.get_parameter("weight").shape
        return features, outputs
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if not (isinstance(sizes[0], int) and isinstance(sizes[1], int)):
        raise LayerError(
            f"expected a layer with in_features and out_features, got a {type(layer).__name__}; "
            "leave it out"
        )
    return sizes[0], sizes[1]
