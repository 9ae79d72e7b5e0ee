"""Loss of LoRA of fused experts when PEFT loads it."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)

from ipa_hf.adapter_holder import adapter_holder, base_model
from ipa_hf.layer_names import base_name


def lost_on_loading(peft_model: torch.nn.Module, adapter_name: str) -> set[str]:
    """Return the modules whose LoRA PEFT saves under keys that it renames on loading."""
    holder = adapter_holder(peft_model)
    saved = get_peft_model_state_dict(
        holder, adapter_name=adapter_name, save_embedding_layers=False
    )
    return renamed_on_loading(
        base_model(holder), holder.peft_config[adapter_name], saved, adapter_name
    )


def renamed_on_loading(
    model: torch.nn.Module,
    config: LoraConfig,
    saved: dict[str, torch.Tensor],
    adapter_name: str = "default",
) -> set[str]:
    """Return the modules whose keys in a saved adapter are other ones after loading.

    On loading, PEFT applies transformers' renamings of checkpoint keys. In some models they match
    the current names of modules too, and the LoRA is lost with a warning.
    """
    loaded = convert_peft_adapter_state_dict_for_transformers(model, config, saved, adapter_name)
    lost = (key.removeprefix("base_model.model.") for key in saved.keys() - loaded.keys())
    return {base_name(key.partition(".lora_")[0]) for key in lost}
