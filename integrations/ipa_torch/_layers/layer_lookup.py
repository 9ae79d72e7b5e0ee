"""Lookup and validation of a layer by name."""

from __future__ import annotations

from torch import nn

from ipa_core.errors import ShapeError, with_context
from ipa_torch._layers.adapter_support import check_supported
from ipa_torch._layers.execution_device import execution_device
from ipa_torch._layers.feature_counts import features_of
from ipa_torch.errors import LayerError


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """Return a layer by name.

    Raises
    ------
    LayerError
        If there is none of this name, or it is the model itself, or its forward never runs.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        cure = "check the name"
        if name.endswith("]"):  # of ipa_hf.expert_layers
            cure = "adapt fused experts with ipa_hf.get_ipa_model"
        raise LayerError(f"expected a layer of the model, got {name!r}: {error}; {cure}") from error
    parent = model.get_submodule(name.rpartition(".")[0])
    if layer is model:
        raise LayerError(
            "expected a layer inside the model, got the model; wrap it in a Sequential"
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise LayerError(
            f"layer {name!r}: expected a layer whose forward runs, got a layer of "
            "nn.MultiheadAttention, which uses its weight without calling it; leave it out"
        )
    return layer


def check_fit(name: str, layer: nn.Module, features: int) -> None:
    """Check that a layer supports adapters and has the features of its projector.

    Raises
    ------
    ShapeError
        If they differ.
    LayerError
        If the layer is neither linear nor a plain convolution, returns no tensor of its outputs,
        or has no weights yet.
    """
    check_supported(name, layer)
    try:
        execution_device(layer)
    except LayerError as error:
        raise with_context(error, f"layer {name!r}") from error
    if (expected := features_of(layer)) != features:
        raise ShapeError(
            f"layer {name!r}: expected a projector of {expected} features, got {features}; "
            "was it learned on another model?"
        )
