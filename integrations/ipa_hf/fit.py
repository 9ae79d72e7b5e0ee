"""Fit projectors of LoRA layers to the base model's activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from ipa_hf.lora_layers import base_model_only
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
    peft_model: PeftModel, ranks: Mapping[str, int], batches: Iterable[Any], options: FitOptions
) -> LayerProjectors:
    """Return projectors of these ranks for layers, by their names in the base model."""
    with base_model_only(peft_model), _without_cache(peft_model), _without_repacking(peft_model):
        return fit_projectors(
            peft_model.get_base_model(),
            batches,
            ranks,
            targets=lambda name, module: name in ranks,
            on_missing="ignore",
            **options,
        )
