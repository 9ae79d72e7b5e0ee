"""LoRA of fused experts in PEFT's layout: A is expert-major, B is rank-major."""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import ParamWrapper

from ipa_hf.fused_parameters import FusedParameter, refusal


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


def expert_A_and_B(layer: ParamWrapper, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of A (experts, rank, features) and B (experts, outputs, rank)."""
    a, b = (part[adapter_name].get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
    experts = layer.num_experts
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)
