"""Configuration of a LoRA adapter, and the allowlist of its supported fields."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft import LoraConfig

from ipa_core.errors import SettingError
from ipa_core.settings import boolean, check_instance, integer, number
from ipa_hf.adapter_holder import adapter_holder
from ipa_torch.extension import check_dropout

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
    if not isinstance(adapter_name, str) or adapter_name not in known:
        raise SettingError(
            f"expected one of the adapters {sorted(known)}, got {adapter_name!r:.80}"
        )
    config = known[adapter_name]
    if not isinstance(config, LoraConfig):
        raise SettingError(f"expected a LoRA adapter, got {adapter_name!r} of {config.peft_type}")
    return config


def check_lora_config(config: Any) -> None:
    """Check that a configuration is one of LoRA, whose scaling and dropout can be computed.

    Raises
    ------
    SettingError
        If it is not.
    """
    check_instance("config", config, LoraConfig, "a peft.LoraConfig")
    integer("r of the LoraConfig", config.r, least=1)
    boolean("use_rslora of the LoraConfig", config.use_rslora)
    check_dropout(config.lora_dropout)
    _check_alpha("lora_alpha", config.lora_alpha)
    check_instance("alpha_pattern of the LoraConfig", config.alpha_pattern, Mapping, "a mapping")
    for name, alpha in config.alpha_pattern.items():
        _check_alpha(f"alpha_pattern[{name!r}]", alpha)


def _check_alpha(name: str, alpha: Any) -> None:
    form = "a finite number other than 0"
    number(f"{name} of the LoraConfig", alpha, form=form, valid=_is_scaling)


def _is_scaling(alpha: float) -> bool:
    return math.isfinite(alpha) and alpha != 0


def copy_lora_config(config: LoraConfig) -> LoraConfig:
    """Return a deep copy of a configuration.

    Raises
    ------
    SettingError
        If a field cannot be copied, such as a generator of names.
    """
    try:
        return copy.deepcopy(config)
    except TypeError as error:
        raise SettingError(
            f"expected a LoraConfig of plain values, got {error}; pass names as a list"
        ) from error


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
