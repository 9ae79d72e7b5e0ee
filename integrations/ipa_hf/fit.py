"""Fit projectors of LoRA layers to the base model's activations."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ipa_hf.adapter_holder import base_model
from ipa_hf.expert_lora import layer_name
from ipa_hf.fused_parameters import ExpertSharing
from ipa_hf.lora_layers import base_model_only
from ipa_hf.temporary_expert_layers import expert_layers
from ipa_torch import FitOptions, LayerProjectors, fit_projectors


@contextmanager
def _without_cache(model: torch.nn.Module) -> Iterator[None]:
    """Disable the key-value cache; with it, packed sequences would attend to each other."""
    configs = [config for module in model.modules() if (config := getattr(module, "config", None))]
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def _without_repacking(model: torch.nn.Module) -> Iterator[None]:
    """Prevent bitsandbytes from repacking 4-bit weights.

    On CPUs with bfloat16 instructions its layers repack their weights in the first evaluation, with
    less precise scales, permanently.
    """
    flag = "support_avx512bf16_for_cpu"
    repacking = [module for module in model.modules() if getattr(module, flag, False)]
    try:
        for module in repacking:
            setattr(module, flag, False)
        yield
    finally:
        for module in repacking:
            setattr(module, flag, True)


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
    with (
        base_model_only(peft_model),
        _without_cache(peft_model),
        _without_repacking(peft_model),
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
