"""LoRA of fused experts in PEFT's layout: A is expert-major, B is rank-major."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)

from ipa_hf.adapter_holder import adapter_holder, base_model
from ipa_hf.fused_parameters import FusedParameter, base_name, refusal


def parameter_name(module_name: str, layer: ParamWrapper) -> str:
    """Return the name of a wrapped parameter in the base model.

    PEFT nests the wrappers of two parameters of a module, so their module names differ.
    """
    return f"{base_name(module_name)}.{layer.parameter_name}"


def unsupported_reason(layer: ParamWrapper) -> str | None:
    """Return the reason that a wrapped parameter takes no projection; None if it takes one."""
    experts = layer.get_base_layer()
    if (reason := refusal(experts, layer.parameter_name)) is not None:
        return reason
    if layer.get_param().is_meta:  # PEFT adds B A to the weights before accelerate loads them
        return f"{type(experts).__name__}, whose weights are offloaded"
    _, features, _ = FusedParameter(layer.parameter_name, experts).sizes
    if layer.in_features != features:
        return f"{type(experts).__name__}, whose inputs and outputs PEFT confuses"
    return None


def lost_on_loading(peft_model: torch.nn.Module, adapter_name: str) -> set[str]:
    """Return the modules whose LoRA PEFT saves under keys that it renames on loading."""
    holder = adapter_holder(peft_model)
    saved = get_peft_model_state_dict(
        holder, adapter_name=adapter_name, save_embedding_layers=False
    )
    return renamed_on_loading(
        base_model(holder), holder.peft_config[adapter_name], saved, adapter_name
    )


def renamed_on_loading(
    model: torch.nn.Module,
    config: LoraConfig,
    saved: dict[str, torch.Tensor],
    adapter_name: str = "default",
) -> set[str]:
    """Return the modules whose keys in a saved adapter are other ones after loading.

    On loading, PEFT applies transformers' renamings of checkpoint keys. In some models they match
    the current names of modules too, and the LoRA is lost with a warning.
    """
    loaded = convert_peft_adapter_state_dict_for_transformers(model, config, saved, adapter_name)
    lost = (key.removeprefix("base_model.model.") for key in saved.keys() - loaded.keys())
    return {base_name(key.partition(".lora_")[0]) for key in lost}


def expert_A_and_B(layer: ParamWrapper, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of A (experts, rank, features) and B (experts, outputs, rank)."""
    a, b = (part[adapter_name].get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
    experts = layer.num_experts
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)


def layer_name(slot: str) -> str:
    """Return the layer or parameter of a slot.

    Examples
    --------
    >>> layer_name("model.layers.0.mlp.experts.gate_up_proj[3]")
    'model.layers.0.mlp.experts.gate_up_proj'
    """
    return slot.partition("[")[0]


def compact_names(slots: Iterable[str]) -> list[str]:
    """Return names of slots, with the experts of a parameter joined.

    Examples
    --------
    >>> compact_names(["q_proj", "experts.up_proj[0]", "experts.up_proj[7]"])
    ['q_proj', 'experts.up_proj[0, 7]']
    """
    experts: dict[str, list[str]] = {}
    for slot in slots:
        experts.setdefault(layer_name(slot), []).append(slot.partition("[")[2].rstrip("]"))
    return [f"{name}[{', '.join(which)}]" if which[0] else name for name, which in experts.items()]
