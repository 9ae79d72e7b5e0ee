"""Holding learned projections fixed, through everything PEFT does to trainable flags."""

from __future__ import annotations

from collections.abc import Collection

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ipa_core.errors import SettingError
from ipa_hf.lora_layers import adapted_layers, lora_A_and_B, lora_config, takes_projection


def freeze_projections(
    peft_model: PeftModel,
    adapter_name: str = "default",
    *,
    layers: Collection[str] | None = None,
) -> PeftModel:
    """Hold the A of a LoRA adapter fixed, so that only B is trained.

    The flags survive ``set_adapter``, ``disable_adapter``, ``delete_adapter`` of others and
    ``load_adapter``; PEFT does not save them. `ipa_hf.load` restores them; after PEFT's own
    ``from_pretrained(..., is_trainable=True)`` call this function. Call it before the optimizer is
    made.

    Parameters
    ----------
    peft_model : PeftModel
        Changed in place.
    adapter_name : str, default "default"
        The adapter.
    layers : collection of str, optional
        Names of layers in the base model; all adapted linear layers by default.

    Returns
    -------
    PeftModel
        The same model.

    Raises
    ------
    SettingError
        If there is no such LoRA adapter, or it has no such layer.

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
    found = {
        name: layer
        for name, layer in adapted_layers(peft_model, adapter_name).items()
        if takes_projection(layer, adapter_name)
    }
    wanted = found if layers is None else layers
    for name in wanted:
        if name not in found:
            raise SettingError(
                f"layer {name!r}: expected a linear layer with the adapter {adapter_name!r}, "
                "got none of this name"
            )
        set_lora_A_frozen(found[name], adapter_name, True)
    return peft_model


def set_lora_A_frozen(layer: LoraLayer, adapter_name: str, held: bool) -> None:
    """Hold the A of a layer fixed, or let it be as trainable as its B."""
    a, b = lora_A_and_B(layer, adapter_name)
    a.requires_grad_(b.requires_grad and not held)
    # PEFT's own list of weights that no switch of adapters makes trainable again. Rebound, as the
    # empty default belongs to the class.
    names = {*layer.frozen_peft_weight_names.get(adapter_name, ())} - {"lora_A"}
    layer.frozen_peft_weight_names = layer.frozen_peft_weight_names | {
        adapter_name: (*sorted(names), "lora_A") if held else tuple(sorted(names))
    }
