"""Putting an adapted layer in a layer's place, and the layer back."""

from __future__ import annotations

from typing import Any

from torch import nn

from ipa_torch._adapters.layer import AdapterLayer
from ipa_torch._layers.unwrap import unwrap_model

_FROZEN = "_ipa_frozen"


def adapter_layers(model: nn.Module) -> list[tuple[str, AdapterLayer]]:
    """Return the adapted layers of a model by name."""
    return [
        (name, m) for name, m in unwrap_model(model).named_modules() if isinstance(m, AdapterLayer)
    ]


def wrap(model: nn.Module, name: str) -> AdapterLayer:
    """Return the adapted layer of that name, made and put in place if there is none."""
    layer = model.get_submodule(name)
    if isinstance(layer, AdapterLayer):
        return layer
    made = AdapterLayer(layer)
    _replace(model, layer, made)
    return made


def unwrap(model: nn.Module, layer: AdapterLayer) -> None:
    """Put the plain layer back."""
    layer.base_layer.train(layer.training)
    _replace(model, layer, layer.base_layer)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another one, wherever that is."""
    for parent in [module for module in model.modules() if module is not new]:
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
        if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(new, AdapterLayer):
            _keep_off_fast_path(new)


def _keep_off_fast_path(layer: AdapterLayer) -> None:
    """Keep nn.TransformerEncoderLayer from reading weights past the layers that hold them.

    In evaluation mode it calls a fused kernel, unless one of its modules has a hook.
    """
    if not layer._forward_pre_hooks:
        layer.register_forward_pre_hook(_noop_hook)


def _noop_hook(module: nn.Module, args: Any) -> None:
    return None


def freeze(model: nn.Module) -> None:
    """Freeze all parameters, once, and remember which."""
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
