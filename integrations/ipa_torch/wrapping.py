"""Putting an adapted layer in a layer's place, and the layer back."""

from __future__ import annotations

from typing import Any

from torch import nn

from ipa_core.errors import ShapeError, with_context
from ipa_torch.adapted import Adapted, features_of
from ipa_torch.errors import LayerError
from ipa_torch.reading import reading_of

_FROZEN = "_ipa_frozen"


def plain(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` or DDP may have wrapped.

    In each forward pass DDP sends buffers round, in evaluation too: workers with unequal numbers of
    batches would wait for each other for ever.
    """
    while True:
        inner = getattr(model, "_orig_mod", model)
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        if inner is model or not isinstance(inner, nn.Module):
            return model
        model = inner


def wrapped(model: nn.Module) -> list[tuple[str, Adapted]]:
    """Return the adapted layers of a model by name."""
    return [(name, m) for name, m in plain(model).named_modules() if isinstance(m, Adapted)]


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """Return a layer by name.

    Raises
    ------
    LayerError
        If there is none, or it is the model itself, or one whose forward never runs.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise LayerError(f"expected a layer of the model, got {name!r}: {error}") from error
    parent = model.get_submodule(name.rpartition(".")[0])
    if layer is model:
        raise LayerError(
            "expected a layer inside the model, got the model; wrap it in a Sequential"
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise LayerError(
            f"layer {name!r}: expected a layer whose forward runs, got one that "
            "nn.MultiheadAttention reads the weight of; leave it out"
        )
    return layer


def check_fit(name: str, layer: nn.Module, features: int) -> None:
    """Hold a projector's features against those of its layer.

    Raises
    ------
    ShapeError
        If they differ.
    LayerError
        If the layer is no matrix.
    """
    try:
        reading_of(layer)
        own = features_of(layer)
    except LayerError as error:
        raise with_context(error, f"layer {name!r}") from error
    if own != features:
        raise ShapeError(
            f"layer {name!r}: expected a projector of {own} features, got one of {features}; "
            "was it learned on another model?"
        )


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
