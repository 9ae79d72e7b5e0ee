"""Freezing of a model's parameters while adapters are trained."""

from __future__ import annotations

from torch import nn

from ipa_torch._adapters.adapter_layer import adapter_layers

#: Name of the attribute of a model with the names of its parameters that were trainable.
_FROZEN = "_ipa_frozen"


def freeze(model: nn.Module) -> None:
    """Freeze all parameters of a model without adapters, and record which were trainable."""
    if adapter_layers(model):
        return
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    model.__dict__[_FROZEN] = names
    model.requires_grad_(False)


def unfreeze(model: nn.Module) -> None:
    """Undo `freeze`."""
    frozen = set(model.__dict__.pop(_FROZEN, ()))
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(True)
