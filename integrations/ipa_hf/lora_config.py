"""Configuration of a LoRA adapter, and the allowlist of its supported fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from peft import LoraConfig

from ipa_core.errors import SettingError
from ipa_hf.adapter_holder import adapter_holder

#: Fields that do not change what an adapter computes: z = W x + alpha / r * B A x.
PLAIN_LORA = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "peft_version",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "use_rslora",
    }
)
#: Fields that keep B A x and the base weights, but add trained parts or change where it applies.
TRAINABLE_LORA = PLAIN_LORA | {
    "alora_invocation_tokens",
    "bias",
    "ensure_weight_tying",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "trainable_token_indices",
    "use_dora",
}

#: Methods of initialization that leave the base weights as they are.
KEEPING_BASE_WEIGHTS = (True, False, "gaussian", "eva", "orthogonal")


def lora_config(peft_model: torch.nn.Module, adapter_name: str) -> LoraConfig:
    """Return the configuration of a LoRA adapter.

    Raises
    ------
    SettingError
        If the model has no adapter of this name, or the adapter is not LoRA.
    """
    known = adapter_holder(peft_model).peft_config
    if adapter_name not in known:
        raise SettingError(f"expected one of the adapters {sorted(known)}, got {adapter_name!r}")
    config = known[adapter_name]
    if not isinstance(config, LoraConfig):
        raise SettingError(f"expected a LoRA adapter, got {adapter_name!r} of {config.peft_type}")
    return config


def unsupported_fields(config: LoraConfig, supported: Collection[str]) -> list[str]:
    """Return the names of fields that are neither supported nor at their default.

    Fields of later PEFT versions and of subclasses are unsupported until they are listed.
    """
    return sorted(
        field.name
        for field in dataclasses.fields(config)
        if field.name not in supported
        and (value := getattr(config, field.name)) != _default(field)
        # An empty collection stands for None in configurations that were loaded from JSON.
        and (value or _default(field))
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
