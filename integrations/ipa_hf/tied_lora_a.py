"""Adapters of a PEFT model whose A is one module in each layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from ipa_core.errors import SettingError
from ipa_hf.freezing import set_lora_A_frozen
from ipa_hf.lora_config import PLAIN_LORA, lora_config, unsupported_fields
from ipa_hf.lora_layers import lora_A_and_B, lora_layers, takes_projection
from ipa_hf.shared_lora_layers import SharedLoraA, SharedLoraLinear


def are_tied(peft_model: PeftModel, names: Iterable[str]) -> bool:
    """Return whether adapters have the same layers, and in each the same module A."""
    modules = [
        {
            layer: x.lora_A[name]
            for layer, x in lora_layers(peft_model, name).items()
            if name in x.lora_A
        }
        for name in names
    ]
    return bool(modules) and bool(modules[0]) and all(other == modules[0] for other in modules)


def tied_layers(peft_model: PeftModel, names: list[str]) -> Mapping[str, LoraLayer]:
    """Return the layers of adapters, after a check that these share A."""
    first = names[0]
    for name in names:
        lora_config(peft_model, name)
        if not are_tied(peft_model, [first, name]):
            raise SettingError(
                f"expected adapters that share A, got {name!r}, which does not share that of "
                f"{first!r}; join them with ipa_hf.share, or name those that do"
            )
    return lora_layers(peft_model, first)


def check_tieable(peft_model: PeftModel, source: str, name: str) -> None:
    """Check that two adapters of a model can share A.

    Raises
    ------
    SettingError
        If they differ in A or in their layers, or one is not plain LoRA.
    """
    layers = lora_layers(peft_model, source)
    _check_shareable(peft_model, source, layers)
    if name != source:
        others = lora_layers(peft_model, name)
        _check_shareable(peft_model, name, others)
        _check_equal_A(layers, others, source, name)


def tie_adapter(peft_model: PeftModel, source: str, name: str, config: LoraConfig) -> None:
    """Make A of an adapter that of another one; add the adapter if it is new.

    Raises
    ------
    SettingError
        If the adapters differ in A or in their layers, or the source is not plain LoRA.
    """
    if name not in peft_model.peft_config:
        check_tieable(peft_model, source, source)
        peft_model.add_adapter(name, copy.deepcopy(config))
    else:
        check_tieable(peft_model, source, name)
    for layer in lora_layers(peft_model, source).values():
        tie_lora_A(layer, source, name)
        for adapter in (source, name):
            set_lora_A_frozen(layer, adapter, True)


def _check_shareable(
    peft_model: PeftModel, adapter_name: str, layers: Mapping[str, LoraLayer]
) -> None:
    """Check that an adapter is plain, unmerged LoRA of linear layers."""
    if used := unsupported_fields(lora_config(peft_model, adapter_name), PLAIN_LORA):
        raise SettingError(
            f"expected adapters of plain LoRA, got {used} in {adapter_name!r}; share A without them"
        )
    for name, layer in layers.items():
        if isinstance(layer, ParamWrapper) or not takes_projection(layer, adapter_name):
            kind = type(layer.get_base_layer()).__name__
            raise SettingError(
                f"layer {name!r}: expected a linear layer, got {kind}; leave it out of the targets"
            )
        if layer.merged:
            raise SettingError(
                f"layer {name!r}: expected a model without merged adapters, got "
                f"{layer.merged_adapters} merged; call unmerge_adapter() first"
            )


def _check_equal_A(
    layers: Mapping[str, LoraLayer], others: Mapping[str, LoraLayer], source: str, name: str
) -> None:
    if layers.keys() != others.keys():
        raise SettingError(
            f"expected adapters of the same layers, got {sorted(layers.keys() ^ others.keys())} in "
            f"only one of {source!r} and {name!r}"
        )
    for layer_name, layer in layers.items():
        first, second = (lora_A_and_B(layer, adapter)[0] for adapter in (source, name))
        if first.dtype != second.dtype or not torch.equal(first, second):
            raise SettingError(
                f"layer {layer_name!r}: expected adapters with the same A, got other values in "
                f"{name!r} than in {source!r}; train them over one A, with ipa_hf.share"
            )


def tie_lora_A(layer: LoraLayer, source: str, adapter_name: str) -> None:
    """Make A of an adapter that of another one: the same module."""
    a = layer.lora_A[source]
    layer.lora_A[adapter_name] = a
    # PEFT makes these modules; their classes change afterwards, as for parametrized modules.
    if type(a) is nn.Linear:
        a.__class__ = SharedLoraA
    if type(layer) is Linear:
        layer.__class__ = SharedLoraLinear
