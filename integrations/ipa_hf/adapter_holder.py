"""Module that holds PEFT's adapters: a PEFT model, or a transformers model by itself."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftMixedModel, PeftModel

from ipa_core.errors import SettingError
from ipa_torch.extension import check_model, unwrap_model


def adapter_holder(model: torch.nn.Module) -> Any:
    """Return the module whose ``peft_config`` names the adapters.

    It is a `PeftModel` or `PeftMixedModel`, a transformers model after ``add_adapter`` or
    ``load_adapter``, or such a model inside another one, as in sentence-transformers.

    Raises
    ------
    SettingError
        If there is none.
    """
    holder = _find_holder(model)
    if holder is not None:
        return holder
    raise SettingError(
        f"expected a model with adapters of PEFT, got a {type(model).__name__} without; add one "
        "with ipa_hf.get_ipa_model, peft.get_peft_model or the model's add_adapter"
    )


def check_without_adapters(model: torch.nn.Module, cure: str) -> None:
    """Check that a model holds no adapters of PEFT: a second injection would wrap them.

    A part of the model may hold some.

    Raises
    ------
    SettingError
        If it does.
    """
    check_model(model)
    holder: Any = unwrap_model(model)
    if isinstance(getattr(holder, "peft_config", None), dict):
        raise SettingError(
            f"expected a model without adapters, got a {type(holder).__name__} with "
            f"{sorted(holder.peft_config)}; {cure}"
        )


def _find_holder(model: torch.nn.Module) -> Any | None:
    check_model(model)
    for module in model.modules():
        holder = unwrap_model(module)
        if isinstance(getattr(holder, "peft_config", None), dict):
            return holder
    return None


def base_model(model: torch.nn.Module) -> Any:
    """Return the model whose layers have the adapters: the names of layers start from it."""
    holder = adapter_holder(model)
    if isinstance(holder, PeftModel):
        return holder.get_base_model()
    return holder.base_model.model if isinstance(holder, PeftMixedModel) else holder
