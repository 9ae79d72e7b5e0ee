"""Weighted sums of adapters over one P: exact in B, with A and its metadata kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ipa_hf.adapter_metadata import attach_metadata, find_metadata
from ipa_hf.freezing import set_lora_A_frozen
from ipa_hf.layer_names import layer_name
from ipa_hf.lora_config import lora_config
from ipa_hf.lora_layers import lora_A_and_B, lora_layers, takes_projection
from ipa_hf.tied_lora_a import are_tied, tie_adapter
from ipa_torch.extension import in_float64


def add_weighted_adapter(
    peft_model: PeftModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    **options: Any,
) -> None:
    """Combine adapters as PEFT's ``add_weighted_adapter`` does, and keep an A that they share.

    The method ``"svd"`` without options gives the sum at the rank of its parts where these have the
    same A, up to rounding, but with singular vectors as A. The sum of their B over the same A is
    that sum exactly, and adapters of `ipa_hf.share` go on sharing A. PEFT's result stays everywhere
    else.
    """
    exists = adapter_name in peft_model.peft_config
    exact = not exists and combination_type == "svd" and not options
    if exact and len(adapters) == len(weights) and are_tied(peft_model, adapters):
        source = adapters[0]
        tie_adapter(peft_model, source, adapter_name, lora_config(peft_model, source))
    else:
        tuner: Any = peft_model.base_model
        tuner.add_weighted_adapter(
            list(adapters), list(weights), adapter_name, combination_type, **options
        )
    if not exact:
        return
    kept = dict(_keep_shared(peft_model, dict(zip(adapters, weights, strict=True)), adapter_name))
    metadata = find_metadata(peft_model, adapters[0])
    if metadata is None:
        return
    layers = {slot: x for slot, x in metadata.layers.items() if layer_name(slot) in kept}
    attach_metadata(peft_model, adapter_name, replace(metadata, layers=layers))
    for name in {layer_name(slot) for slot in layers}:
        set_lora_A_frozen(kept[name], adapter_name, metadata.frozen)


@torch.no_grad()
def _keep_shared(
    peft_model: PeftModel, weights: dict[str, float], adapter_name: str
) -> Iterator[tuple[str, LoraLayer]]:
    """Set A and B of the layers whose adapters have the same A; yield these layers."""
    for name, layer in lora_layers(peft_model, adapter_name).items():
        if not takes_projection(layer, adapter_name) or layer.use_dora[adapter_name]:
            continue
        a, b = lora_A_and_B(layer, adapter_name)
        parts = {x: lora_A_and_B(layer, x) for x in weights if x in layer.lora_A}
        shared = next(iter(parts.values()))[0]
        if len(parts) < len(weights) or shared.shape != a.shape:
            continue
        if all(torch.equal(shared, other) for other, _ in parts.values()):
            scaling = layer.scaling
            total = sum(
                weights[x] * scaling[x] * in_float64(part) for x, (_, part) in parts.items()
            )
            a.copy_(shared)
            b.copy_((total / scaling[adapter_name]).to(b.dtype))
            yield name, layer
