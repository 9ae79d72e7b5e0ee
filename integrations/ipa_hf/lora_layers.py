"""Lookup and inspection of the LoRA layers of a PEFT model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from ipa_core.errors import SettingError, with_context
from ipa_hf.adapter_holder import adapter_holder, base_model
from ipa_hf.expert_lora import parameter_name, unsupported_reason
from ipa_torch import LayerError
from ipa_torch.extension import execution_device, unwrap_model


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


def lora_layers(peft_model: torch.nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Return the layers with the adapter by their names in the base model.

    A wrapped parameter has the parameter's name, and a layer within adapters of another kind
    (``mixed=True``) the name of the whole.
    """
    return {
        _name_in_base_model(name, module): module
        for name, module in unwrap_model(base_model(peft_model)).named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


def _name_in_base_model(name: str, layer: LoraLayer) -> str:
    if isinstance(layer, ParamWrapper):
        return parameter_name(name, layer)
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def takes_projection(layer: LoraLayer, adapter_name: str) -> bool:
    """Return whether the layer computes B A x for rows x: linear layers and fused experts do."""
    if isinstance(layer, ParamWrapper):
        return unsupported_reason(layer) is None
    if isinstance(layer, MultiheadAttention) or adapter_name not in layer.lora_A:
        return False
    return lora_A_and_B(layer, adapter_name)[0].ndim == 2  # A of a convolution has four axes


def layer_kind(layer: LoraLayer) -> str:
    """Return what an unsupported layer is, in the plural, for error messages."""
    if isinstance(layer, ParamWrapper):
        return f"parameters of {unsupported_reason(layer)},"
    return f"{type(layer.get_base_layer()).__name__} layers"


def lora_A_and_B(layer: LoraLayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights A of shape (rank, features) and B of shape (out features, rank)."""
    a, b = (part[adapter_name].get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
    return a, b


def materialize(name: str, layer: LoraLayer, adapter_name: str) -> None:
    """Allocate and initialize A and B that PEFT left on the meta device (offloaded layers).

    accelerate loads the base weights of an offloaded layer when the layer runs. A and B are small
    and stay on the device where it runs, initialized as in LoRA.

    Raises
    ------
    LayerError
        If the base weights were never loaded.
    SettingError
        If the adapter needs them in memory (DoRA).
    """
    if adapter_name not in layer.lora_B or not lora_A_and_B(layer, adapter_name)[1].is_meta:
        return
    try:
        device = execution_device(layer.get_base_layer())
    except LayerError as error:
        raise with_context(error, f"layer {name!r}") from error
    if layer.use_dora[adapter_name]:
        raise SettingError(
            f"layer {name!r}: expected a layer in memory, as DoRA needs norms of its weights, got "
            "an offloaded one; load it without offloading, or use no DoRA"
        )
    for part in (layer.lora_A, layer.lora_B):
        part[adapter_name].to_empty(device=device)
    layer.reset_lora_parameters(adapter_name, True)


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
