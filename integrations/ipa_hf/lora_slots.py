"""Initialize the lora_A of layers from projectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from ipa_core import Projector
from ipa_core.errors import RankError, ShapeError
from ipa_hf.adapter_metadata import LayerMetadata
from ipa_hf.expert_lora import expert_A_and_B
from ipa_hf.layer_names import layer_name
from ipa_hf.lora_layers import lora_A_and_B
from ipa_torch.extension import Scaling, resolve_scale


@dataclass(frozen=True)
class LoraSlot:
    """Rows of lora_A that are initialized from a projector.

    Parameters
    ----------
    layer : LoraLayer
        The layer.
    weight : torch.Tensor
        The rows (rank, features): A of a linear layer, or a view of an expert's A.
    """

    layer: LoraLayer
    weight: torch.Tensor


def lora_slots(layers: Mapping[str, LoraLayer], adapter_name: str) -> dict[str, LoraSlot]:
    """Return the slots of layers: ``name`` of a linear layer, ``name[0]`` ... of fused experts."""
    slots: dict[str, LoraSlot] = {}
    for name, layer in layers.items():
        if isinstance(layer, ParamWrapper):
            a, _ = expert_A_and_B(layer, adapter_name)
            slots |= {f"{name}[{expert}]": LoraSlot(layer, rows) for expert, rows in enumerate(a)}
        else:
            slots[name] = LoraSlot(layer, lora_A_and_B(layer, adapter_name)[0])
    return slots


def find_projectors(
    slots: Iterable[str], projectors: Mapping[str, Projector]
) -> tuple[dict[str, Projector], list[str]]:
    """Return the projectors of slots, and the experts that use the projector of their layer.

    Experts of a layer that has only a shared projector are not listed.
    """
    matched, shared = {}, []
    separate = {layer_name(name) for name in projectors if not name.endswith("[:]")}
    for slot in slots:
        if slot in projectors:
            matched[slot] = projectors[slot]
        elif (common := f"{layer_name(slot)}[:]") in projectors:
            matched[slot] = projectors[common]
            if layer_name(slot) in separate:
                shared.append(slot)
    return matched, shared


def truncate_to_slot(name: str, slot: LoraSlot, projector: Projector) -> Projector:
    """Return the projector truncated to the rank of the slot.

    Raises
    ------
    ShapeError
        If the projector has another number of features than the layer.
    RankError
        If the projector has a smaller rank than the layer.
    """
    rank, features = slot.weight.shape
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
    slot: LoraSlot, projector: Projector, scaling: Scaling, adapter_name: str
) -> LayerMetadata:
    """Set the rows of A to s P; return the metadata of this initialization."""
    scale = resolve_scale(projector, scaling, slot.layer.scaling[adapter_name])
    rows = projector.to(torch, device=slot.weight.device).components
    # Not through `set_peft_model_state_dict`, which needs the whole adapter, heads included, and
    # skips unknown names silently.
    with torch.no_grad():
        slot.weight.copy_(scale * rows)
    return LayerMetadata(projector.rank, scale, projector.captured(), projector.samples)
