"""Lookup of a layer by name."""

from __future__ import annotations

from torch import nn

from ipa_core.settings import check_instance
from ipa_torch.errors import LayerError


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """Return a layer by name.

    Raises
    ------
    LayerError
        If there is none of this name, or it is the model itself, or its forward never runs.
    """
    check_instance("the name of a layer", name, str, "a string")
    try:
        layer = model.get_submodule(name)
    except (AttributeError, RuntimeError) as error:
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
