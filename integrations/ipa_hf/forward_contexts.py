"""Contexts in which the base model runs: without adapters, cache, logits and repacking."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

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
def last_logits_only(model: torch.nn.Module, layers: Collection[str]) -> Iterator[None]:
    """Compute the logits of the last token only, and no loss, if ``layers`` are in the decoder.

    The logits of all tokens are the largest tensor of a language model, and the head is up to a
    fifth of the operations of a small one. Models whose ``forward`` has no ``logits_to_keep``
    compute all of them.
    """
    decoder = f"{getattr(model, 'base_model_prefix', '')}."
    parameters = inspect.signature(model.forward).parameters
    if "logits_to_keep" not in parameters or not all(name.startswith(decoder) for name in layers):
        yield
        return

    def reduce(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args or "logits_to_keep" in kwargs:
            return None
        return args, {k: v for k, v in kwargs.items() if k != "labels"} | {"logits_to_keep": 1}

    handle = model.register_forward_pre_hook(reduce, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
