"""One projector into one layer: what must hold before, and what is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from ipa_core import Projector
from ipa_core.errors import RankError, SettingError, ShapeError
from ipa_hf.adapter_metadata import LayerRecord
from ipa_hf.lora_layers import lora_A_and_B
from ipa_hf.scaling import Scaling, factor


def check_fresh(config: LoraConfig, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """Check that nothing is lost by setting A and B: no training, no merge, no changed weights.

    Raises
    ------
    SettingError
        If something would be.
    """
    if config.init_lora_weights not in (True, "gaussian"):
        raise SettingError(
            "expected a LoraConfig with init_lora_weights=True, whose B is zero and whose base "
            f"weights are left alone, got {config.init_lora_weights!r}"
        )
    for name, layer in layers.items():
        if layer.merged:
            raise SettingError(
                f"layer {name!r}: expected a model without merged adapters, got "
                f"{layer.merged_adapters} merged; call unmerge_adapter() first"
            )
        if adapter_name in layer.lora_B and lora_A_and_B(layer, adapter_name)[1].any():
            raise SettingError(
                f"layer {name!r}: expected a fresh adapter, whose B is zero, got a trained one; "
                "add another adapter and initialize that one"
            )


def truncate_to_layer(
    name: str, layer: LoraLayer, projector: Projector, adapter_name: str
) -> Projector:
    """Return the projector cut to the rank of the layer.

    Raises
    ------
    ShapeError
        If it is of other features.
    RankError
        If its rank is smaller.
    """
    rank, features = lora_A_and_B(layer, adapter_name)[0].shape
    if projector.features != features:
        raise ShapeError(
            f"layer {name!r}: expected a projector of {features} features, got "
            f"{projector.features}; was it learned from the input of this layer?"
        )
    if projector.rank < rank:
        raise RankError(
            f"layer {name!r}: expected a projector of rank {rank} or more, got {projector.rank}; "
            "learn a larger one, or lower r or rank_pattern"
        )
    return projector.truncate(rank)


def write_lora_A(
    layer: LoraLayer, projector: Projector, scaling: Scaling, adapter_name: str
) -> LayerRecord:
    """Set the layer's A to s P, and return what was done."""
    weight, _ = lora_A_and_B(layer, adapter_name)
    scale = factor(projector, scaling, layer.scaling[adapter_name])
    rows = projector.to(torch, device=weight.device).components
    # Written here and not through `set_peft_model_state_dict`: that one wants the whole adapter,
    # heads included, and passes over names that it does not know.
    with torch.no_grad():
        weight.copy_(scale * rows)
    return LayerRecord(projector.rank, scale, projector.captured(), projector.samples)
