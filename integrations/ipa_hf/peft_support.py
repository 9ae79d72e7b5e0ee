"""Target layers that PEFT can train, save and load."""

from __future__ import annotations

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from ipa_hf.renamed_keys import renamed_on_loading
from ipa_torch.extension import is_conv1d, is_linear

#: Layers that PEFT refuses in models of these types, as Mamba's kernels read their weights.
_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_READ_BY_KERNELS = ("out_proj", "conv1d")


def is_known_to_peft(module: nn.Module, model: nn.Module) -> bool:
    """Return whether PEFT knows a linear layer; quantized ones are of many classes."""
    if getattr(model, "is_quantized", False):
        return is_linear(module)
    plain = type(module).forward is nn.Linear.forward or is_conv1d(module)
    return plain or (isinstance(module, nn.Linear) and _keeps_rows(module))


@torch.no_grad()
def _keeps_rows(module: nn.Linear) -> bool:
    """Return whether a layer with a forward of its own takes rows: grouped ones do not."""
    weight = module.weight
    try:
        outputs = module(
            torch.zeros(2, module.in_features, device=weight.device, dtype=weight.dtype)
        )
    except RuntimeError:  # shapes that do not fit
        return False
    return isinstance(outputs, torch.Tensor) and outputs.shape == (2, module.out_features)


def trainable_by_peft(model: nn.Module, names: list[str]) -> list[str]:
    """Leave out layers under names that PEFT refuses, takes for experts, or loses on loading."""
    leaves = {name.rpartition(".")[2] for name in names}
    if getattr(getattr(model, "config", None), "model_type", None) in _MAMBA:
        leaves -= {*_READ_BY_KERNELS}
    kept = {leaf for leaf in leaves if _keeps_target_name(model, leaf)}
    names = [name for name in names if name.rpartition(".")[2] in kept]
    lost = renamed_on_loading(model, LoraConfig(target_modules=names), _saved(names))
    return [name for name in names if name not in lost]


def _saved(names: list[str]) -> dict[str, torch.Tensor]:
    """Return what a saved adapter of these layers would have, with tensors of one number."""
    keys = (f"base_model.model.{name}.lora_{part}.weight" for name in names for part in "AB")
    return {key: torch.zeros(1, 1) for key in keys}


def _keeps_target_name(model: nn.Module, leaf: str) -> bool:
    """Return whether a target stays one: in some models PEFT takes ``up_proj`` for experts'."""
    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return False
    return list(config.target_modules or ()) == [leaf]
