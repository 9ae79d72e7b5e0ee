"""Freezing of lora_A that survives PEFT's changes of ``requires_grad``."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import torch
from peft.tuners.lora import LoraLayer

from ipa_core.errors import SettingError
from ipa_core.settings import check_instance, check_iterable
from ipa_hf.layer_names import layer_name
from ipa_hf.lora_config import lora_config
from ipa_hf.lora_layers import lora_A_and_B, lora_layers, takes_projection

Model = TypeVar("Model", bound=torch.nn.Module)


def freeze_projections(
    peft_model: Model,
    adapter_name: str = "default",
    *,
    layers: Collection[str] | None = None,
) -> Model:
    """Freeze the A of a LoRA adapter, so that only B is trained.

    A stays frozen through ``set_adapter``, ``disable_adapter``, ``load_adapter`` and
    ``delete_adapter`` of another adapter. PEFT does not save the flags: `ipa_hf.load_adapter`
    restores them; after ``PeftModel.from_pretrained(..., is_trainable=True)`` call this function.
    Call it before the optimizer is created.

    Parameters
    ----------
    peft_model : torch.nn.Module
        A `PeftModel`, also with ``mixed=True``, or a model that holds PEFT's adapters: a
        transformers model after ``add_adapter`` or ``load_adapter``, also within
        sentence-transformers. Modified in place.
    adapter_name : str, default "default"
        The adapter.
    layers : collection of str, optional
        Names of layers or fused parameters in the base model; by default all linear layers and
        fused experts with the adapter.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    SettingError
        If the model has no such LoRA adapter, or the adapter no such layer.

    Examples
    --------
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import BertConfig, BertModel
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> bert = BertModel(BertConfig(vocab_size=16, **size))
    >>> model = get_peft_model(bert, LoraConfig(r=2, target_modules=["query"]))
    >>> [name[-27:] for name, p in freeze_projections(model).named_parameters() if p.requires_grad]
    ['query.lora_B.default.weight']
    """
    lora_config(peft_model, adapter_name)
    linear = {
        name: layer
        for name, layer in lora_layers(peft_model, adapter_name).items()
        if takes_projection(layer, adapter_name)
    }
    for name in linear if layers is None else _layer_names(layers):
        if name not in linear:
            raise SettingError(
                f"layer {name!r}: expected a linear layer with adapter {adapter_name!r}, got none; "
                f"choose among {sorted(linear)}"
            )
        set_lora_A_frozen(linear[name], adapter_name, True)
    return peft_model


def _layer_names(slots: Collection[str]) -> set[str]:
    check_iterable("layers", slots, "names of layers, or None")
    slots = tuple(slots)
    for slot in slots:
        check_instance("each name of the layers", slot, str, "a string")
    return {layer_name(slot) for slot in slots}


def set_lora_A_frozen(layer: LoraLayer, adapter_name: str, frozen: bool) -> None:
    """Freeze the A of a layer, or make it as trainable as its B."""
    a, b = lora_A_and_B(layer, adapter_name)
    a.requires_grad_(b.requires_grad and not frozen)
    # PEFT keeps the weights listed here frozen when it switches adapters. The attribute is
    # replaced, not mutated, as its empty default belongs to the class.
    names = {*layer.frozen_peft_weight_names.get(adapter_name, ())} - {"lora_A"}
    layer.frozen_peft_weight_names = layer.frozen_peft_weight_names | {
        adapter_name: (*sorted(names), "lora_A") if frozen else tuple(sorted(names))
    }
