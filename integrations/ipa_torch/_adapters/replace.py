"""Replacement of layers by `AdapterLayer`, and freezing of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import nn

from ipa_core.errors import SettingError
from ipa_torch._adapters.adapter_layer import AdapterLayer
from ipa_torch._adapters.hook_transfer import move_hooks
from ipa_torch._adapters.layer_replacement import replace_everywhere
from ipa_torch._adapters.pass_lock import PassLock
from ipa_torch._distributed.process_group import is_sharded
from ipa_torch._layers.unwrap import unwrap_model

_FROZEN, _NOOP, _LOCK = "_ipa_frozen", "_ipa_noop_hook", "_ipa_pass_lock"


def adapter_layers(model: nn.Module) -> list[tuple[str, AdapterLayer]]:
    """Return the adapter layers of a model by name."""
    return [
        (name, m) for name, m in unwrap_model(model).named_modules() if isinstance(m, AdapterLayer)
    ]


def check_unwrapped(model: nn.Module) -> None:
    """Check that no data-parallel wrapper has taken the model's parameters already.

    Raises
    ------
    SettingError
        If one has: it would not reduce the gradients of new parameters, and ranks would drift.
    """
    parallel = nn.parallel.DistributedDataParallel
    wrapped = any(isinstance(module, parallel) for module in model.modules())
    if wrapped or is_sharded(model):
        kind = "DistributedDataParallel" if wrapped else "FSDP"
        raise SettingError(
            f"expected a model that is not wrapped yet, got one under {kind}, which does not know "
            "the adapter's parameters; attach or load all adapters first, then wrap"
        )


def wrap(model: nn.Module, names: Iterable[str]) -> dict[str, AdapterLayer]:
    """Return the adapter layers of some names; wrap the layers that are not wrapped yet."""
    layers = {name: model.get_submodule(name) for name in names}
    fresh = {
        layer: AdapterLayer(layer, _pass_lock_of(model))
        for layer in layers.values()
        if not isinstance(layer, AdapterLayer)
    }
    on_fast_path = any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules())
    for layer, adapter_layer in fresh.items():
        move_hooks(layer, adapter_layer)
        if on_fast_path:
            _keep_off_fast_path(adapter_layer)
    replace_everywhere(model, fresh)
    return {name: cast(AdapterLayer, fresh.get(layer, layer)) for name, layer in layers.items()}


def unwrap(model: nn.Module, layers: Iterable[AdapterLayer]) -> None:
    """Restore the base layers."""
    layers = list(layers)
    for layer in layers:
        if layer.base_layer.training != layer.training:
            layer.base_layer.train(layer.training)
        if (noop := layer.__dict__.pop(_NOOP, None)) is not None:
            noop.remove()
        move_hooks(layer, layer.base_layer)
    replace_everywhere(model, {layer: layer.base_layer for layer in layers})


@contextmanager
def changing(model: nn.Module) -> Iterator[None]:
    """Enclose a change of adapters: passes of other threads end before it or begin after it.

    The passes are those of the module that adapters were attached to, and of single layers.
    """
    locks = {id(layer.pass_lock): layer.pass_lock for _, layer in adapter_layers(model)}
    with ExitStack() as stack:
        for key in sorted(locks):
            stack.enter_context(locks[key].change())
        yield


def _pass_lock_of(model: nn.Module) -> PassLock:
    """Return the lock of a model; at first, give it one with its hooks."""
    if _LOCK not in vars(model):
        lock = PassLock()
        pre = model.register_forward_pre_hook(lock.pre_hook, prepend=True)
        post = model.register_forward_hook(lock.post_hook, always_call=True)
        vars(model)[_LOCK] = lock, pre, post
    lock, *_ = vars(model)[_LOCK]
    return cast(PassLock, lock)


def remove_pass_lock(model: nn.Module) -> None:
    """Remove the lock of a model that has no adapters any more."""
    _, *handles = vars(model).pop(_LOCK, (None,))
    for handle in handles:
        handle.remove()


def _keep_off_fast_path(layer: AdapterLayer) -> None:
    """Register a hook, with which nn.TransformerEncoderLayer calls its layers.

    Without hooks it calls a fused kernel in evaluation mode, with the weights of its layers.
    """
    vars(layer)[_NOOP] = layer.register_forward_pre_hook(_noop_hook)


def _noop_hook(module: nn.Module, args: Any) -> None:
    return None


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
