"""Checks of an adapter before its initialization."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from ipa_core.errors import SettingError
from ipa_hf.lora_config import TRAINABLE_LORA, check_lora_config, unsupported_fields
from ipa_hf.lora_layers import lora_A_and_B


def check_initializable(config: LoraConfig) -> None:
    """Check that PEFT injects the adapter with B = 0 and leaves the base weights as they are.

    Raises
    ------
    SettingError
        If it is no `LoraConfig`, or a field is neither supported nor at its default.
    """
    check_lora_config(config)
    init = config.init_lora_weights
    if not (init is True or (isinstance(init, str) and init == "gaussian")):
        raise SettingError(
            "expected a LoraConfig with init_lora_weights=True, which keeps B zero and the base "
            f"weights, got {init!r:.80}"
        )
    if used := unsupported_fields(config, TRAINABLE_LORA):
        raise SettingError(
            f"expected a LoraConfig of plain LoRA, got {used}, which may change the base weights "
            "or the shape of A; remove these fields"
        )


def check_fresh(config: LoraConfig, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """Check that the adapter is untrained and unmerged and that its base weights are unchanged.

    Raises
    ------
    SettingError
        If initialization would overwrite training or change the outputs of the base model.
    """
    check_initializable(config)
    for name, layer in layers.items():
        if layer.merged:
            raise SettingError(
                f"layer {name!r}: expected a model without merged adapters, got "
                f"{layer.merged_adapters} merged; call unmerge_adapter() first"
            )
        if adapter_name in layer.lora_B and lora_A_and_B(layer, adapter_name)[1].any():
            raise SettingError(
                f"layer {name!r}: expected a fresh adapter with B = 0, got a trained one; add "
                "another adapter with add_adapter() and initialize it"
            )
