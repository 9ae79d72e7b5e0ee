"""Contexts in which the base model runs: without adapters, cache and repacking."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper


@contextmanager
def base_model_only(model: torch.nn.Module) -> Iterator[None]:
    """Disable all adapters temporarily and restore every ``requires_grad`` afterwards.

    Adapters of any kind and whole modules (``modules_to_save``) are disabled, whatever holds them.
    Biases that were changed by earlier training stay changed.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    enabled = [
        module
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        and not module.disable_adapters
    ]
    try:
        for module in enabled:
            module.enable_adapters(False)
        yield
    finally:
        for module in enabled:
            module.enable_adapters(True)
        # PEFT makes the active adapters trainable, even in a model that was loaded for inference.
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


@contextmanager
def without_cache(model: torch.nn.Module) -> Iterator[None]:
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
def without_repacking(model: torch.nn.Module) -> Iterator[None]:
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
