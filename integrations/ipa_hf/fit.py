"""Fit projectors of LoRA layers to the base model's activations."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ipa_hf.adapter_holder import base_model
from ipa_hf.forward_contexts import base_model_only, without_cache, without_repacking
from ipa_hf.fused_parameters import ExpertSharing
from ipa_hf.last_logits import last_logits_only
from ipa_hf.layer_names import layer_name
from ipa_hf.temporary_expert_layers import expert_layers
from ipa_torch import FitOptions, LayerProjectors, fit_projectors


def fit_lora_projectors(
    peft_model: torch.nn.Module,
    ranks: Mapping[str, int],
    batches: Iterable[Any],
    options: FitOptions,
    *,
    fused: Collection[str],
    sharing: ExpertSharing,
    routing_weights: bool,
) -> LayerProjectors:
    """Return projectors of these ranks for layers, by their names in the base model.

    Names in ``fused`` are those of parameters, which get the layers of `expert_layers`.
    """
    base = base_model(peft_model)
    experts: AbstractContextManager[list[str]] = nullcontext([])
    if fused:
        experts = expert_layers(base, fused, sharing=sharing, routing_weights=routing_weights)
    # The caller's forward pass may need all logits.
    logits = nullcontext() if options.get("forward") else last_logits_only(base)
    with (
        base_model_only(peft_model),
        without_cache(peft_model),
        without_repacking(peft_model),
        logits,
        experts as matrices,
    ):
        names = {*ranks} - {*fused} | {*matrices}
        return fit_projectors(
            base,
            batches,
            {name: ranks[layer_name(name)] for name in names},
            targets=lambda name, module: name in names,
            on_missing="ignore",
            **options,
        )
