"""Putting an adapted layer in a layer's place, and the layer back."""

from __future__ import annotations

from typing import Any

from torch import nn

from ipa_torch._adapters.layer import Adapted
from ipa_torch._layers.unwrap import plain

_FROZEN = "_ipa_frozen"


def wrapped(model: nn.Module) -> list[tuple[str, Adapted]]:
    """Return the adapted layers of a model by name."""
    return [(name, m) for name, m in plain(model).named_modules() if isinstance(m, Adapted)]


def wrap(model: nn.Module, name: str) -> Adapted:
    """Return the adapted layer of that name, made and put in place if there is none."""
    layer = model.get_submodule(name)
    if isinstance(layer, Adapted):
        return layer
    made = Adapted(layer)
    _replace(model, layer, made)
    return made


def unwrap(model: nn.Module, layer: Adapted) -> None:
    """Put the plain layer back."""
    layer.base_layer.train(layer.training)
    _replace(model, layer, layer.base_layer)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another one, wherever that is."""
    for parent in [module for module in model.modules() if module is not new]:
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
        if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(new, Adapted):
            _keep_off_fast_path(new)


def _keep_off_fast_path(layer: Adapted) -> None:
    """Keep nn.TransformerEncoderLayer from reading weights past the layers that hold them.

    In evaluation mode it calls a fused kernel, unless one of its modules has a hook.
    """
    if not layer._forward_pre_hooks:
        layer.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, args: Any) -> None:
    return None


def freeze(model: nn.Module) -> None:
    """Freeze all parameters, once, and remember which."""
    if wrapped(model):
        return
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    model.__dict__[_FROZEN] = names
    model.requires_grad_(False)


def thaw(model: nn.Module) -> None:
    """Undo `freeze`."""
    frozen = set(model.__dict__.pop(_FROZEN, ()))
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(True)
