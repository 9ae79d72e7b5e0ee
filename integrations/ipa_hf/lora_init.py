"""Initialize the lora_A of one layer from a projector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from ipa_core import Projector
from ipa_core.errors import RankError, SettingError, ShapeError
from ipa_hf.adapter_metadata import LayerMetadata
from ipa_hf.lora_layers import lora_A_and_B
from ipa_torch.extension import Scaling, resolve_scale


def check_fresh(config: LoraConfig, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """Check that the adapter is untrained and unmerged and that its base weights are unchanged.

    Raises
    ------
    SettingError
        If initialization would overwrite training or change the outputs of the base model.
    """
    if config.init_lora_weights not in (True, "gaussian"):
        raise SettingError(
            "expected a LoraConfig with init_lora_weights=True, which keeps B zero and the base "
            f"weights, got {config.init_lora_weights!r}"
        )
    for name, layer in layers.items():
        if layer.merged:
            raise SettingError(
                f"layer {name!r}: expected a model without merged adapters, got "
                f"{layer.merged_adapters} merged; call unmerge_adapter() first"
            )
        if adapter_name in layer.lora_B and lora_A_and_B(layer, adapter_name)[1].any():
            raise SettingError(
                f"layer {name!r}: expected a fresh adapter with B = 0, got a trained one; add "
                "another adapter with add_adapter() and initialize it"
            )


def truncate_to_layer(
    name: str, layer: LoraLayer, projector: Projector, adapter_name: str
) -> Projector:
    """Return the projector truncated to the rank of the layer.

    Raises
    ------
    ShapeError
        If the projector has another number of features than the layer.
    RankError
        If the projector has a smaller rank than the layer.
    """
    rank, features = lora_A_and_B(layer, adapter_name)[0].shape
    if projector.features != features:
        raise ShapeError(
            f"layer {name!r}: expected a projector of {features} features, got "
            f"{projector.features}; fit it to the input of this layer"
        )
    if projector.rank < rank:
        raise RankError(
            f"layer {name!r}: expected a projector of rank {rank} or more, got {projector.rank}; "
            "fit one of larger rank, or lower r or rank_pattern"
        )
    return projector.truncate(rank)


def write_lora_A(
    layer: LoraLayer, projector: Projector, scaling: Scaling, adapter_name: str
) -> LayerMetadata:
    """Set the layer's A to s P; return the metadata of this initialization."""
    weight, _ = lora_A_and_B(layer, adapter_name)
    scale = resolve_scale(projector, scaling, layer.scaling[adapter_name])
    rows = projector.to(torch, device=weight.device).components
    # Not through `set_peft_model_state_dict`, which needs the whole adapter, heads included, and
    # skips unknown names silently.
    with torch.no_grad():
        weight.copy_(scale * rows)
    return LayerMetadata(projector.rank, scale, projector.captured(), projector.samples)
