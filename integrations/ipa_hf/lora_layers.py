"""Lookup and inspection of the LoRA layers of a PEFT model."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

from ipa_hf.adapter_holder import base_model
from ipa_hf.expert_lora import unsupported_reason
from ipa_hf.layer_names import parameter_name
from ipa_torch.extension import unwrap_model


def lora_layers(peft_model: torch.nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Return the layers with the adapter by their names in the base model.

    A wrapped parameter has the parameter's name, and a layer within adapters of another kind
    (``mixed=True``) the name of the whole.
    """
    return {
        _name_in_base_model(name, module): module
        for name, module in unwrap_model(base_model(peft_model)).named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


def _name_in_base_model(name: str, layer: LoraLayer) -> str:
    if isinstance(layer, ParamWrapper):
        return parameter_name(name, layer)
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def takes_projection(layer: LoraLayer, adapter_name: str) -> bool:
    """Return whether the layer computes B A x for rows x: linear layers and fused experts do."""
    if isinstance(layer, ParamWrapper):
        return unsupported_reason(layer) is None
    if isinstance(layer, MultiheadAttention) or adapter_name not in layer.lora_A:
        return False
    return lora_A_and_B(layer, adapter_name)[0].ndim == 2  # A of a convolution has four axes


def layer_kind(layer: LoraLayer) -> str:
    """Return what an unsupported layer is, in the plural, for error messages."""
    if isinstance(layer, ParamWrapper):
        return f"parameters of {unsupported_reason(layer)},"
    return f"{type(layer.get_base_layer()).__name__} layers"


def lora_A_and_B(layer: LoraLayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights A of shape (rank, features) and B of shape (out features, rank)."""
    a, b = (part[adapter_name].get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
    return a, b
