"""Which layers of a PEFT model hold a LoRA adapter, and which of them can take a projection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from warnings import catch_warnings, filterwarnings

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

from ipa_core.errors import SettingError


def lora_config(peft_model: PeftModel, adapter_name: str) -> LoraConfig:
    """Return the adapter's configuration, which must be one of LoRA.

    Raises
    ------
    SettingError
        If there is no adapter of this name, or it is of another method.
    """
    known = peft_model.peft_config
    if adapter_name not in known:
        raise SettingError(f"expected one of the adapters {sorted(known)}, got {adapter_name!r}")
    config = known[adapter_name]
    if not isinstance(config, LoraConfig):
        raise SettingError(f"expected a LoRA adapter, got {adapter_name!r} of {config.peft_type}")
    return config


def adapted_layers(peft_model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """Return the layers that hold the adapter, by their names in the base model."""
    return {
        name: module
        for name, module in peft_model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


def takes_projection(layer: LoraLayer, adapter_name: str) -> bool:
    """Return whether the layer computes B A x for rows x: linear ones do, whatever holds W."""
    if isinstance(layer, MultiheadAttention | ParamWrapper) or adapter_name not in layer.lora_A:
        return False
    return matrices(layer, adapter_name)[0].ndim == 2  # convolutions have more axes


def kind(layer: LoraLayer) -> str:
    """Return what sort of layer this is, in the plural, for a message."""
    base = type(layer.get_base_layer()).__name__
    fused = isinstance(layer, ParamWrapper)
    return f"fused parameters of {base}, whose inputs no hook sees," if fused else f"{base} layers"


def matrices(layer: LoraLayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights A of shape (rank, features) and B of shape (out features, rank)."""
    a, b = (part[adapter_name].get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
    return a, b


@contextmanager
def base_model_only(peft_model: PeftModel) -> Iterator[None]:
    """Switch all adapters off, and back on with every parameter as trainable as it was.

    PEFT's own context marks the active adapters as trainable at its end, also in a model that was
    loaded for inference.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    try:
        with catch_warnings():
            # Biases that an earlier training changed stay changed; they are part of the inputs.
            filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
            with peft_model.disable_adapter():
                yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
