"""Replacement of layers by adapter layers, at all places from which a model calls them."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, cast

from torch import nn

from ipa_torch._adapters.adapter_layer import AdapterLayer
from ipa_torch._adapters.hook_transfer import move_hooks
from ipa_torch._adapters.pass_lock import pass_lock_of
from ipa_torch.errors import LayerError

#: Name of the attribute of an adapter layer with the handle of its hook.
_NOOP = "_ipa_noop_hook"

_Replace = Callable[[nn.Module], None]


def replace_everywhere(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules as parts of modules, and in the lists, dicts and closures of attributes.

    Also in the attributes of an object that is an attribute. A call through a list would otherwise
    reach the old layer, past its adapter.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> model.calls = [model[0]]
    >>> replace_everywhere(model, {model[0]: nn.Identity()})
    >>> model[0], model.calls
    (Identity(), [Identity()])
    """
    # Neither into the old layers nor into their adapter layers, which contain them.
    skipped = {id(module) for pair in replacements.items() for module in pair}
    for held, replace, _ in list(module_references(model, skipped)):
        if isinstance(held, nn.Module) and held in replacements and replace is not None:
            replace(replacements[held])


def check_replaceable(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Check that layers can be replaced wherever attributes of the model hold them.

    Raises
    ------
    LayerError
        If a tuple, set, bound method or partial function holds one, which cannot be changed.
    """
    names = {id(layer): name for name, layer in layers.items()}
    for held, replace, place in module_references(model, set(names)):
        if id(held) in names and replace is None:
            raise LayerError(
                f"layer {names[id(held)]!r}: expected a layer that is called by its name in the "
                f"model, got one that {place} holds as well: calls through it would pass the "
                "adapter by; use nn.ModuleList, a list or a dict"
            )


def module_references(
    root: nn.Module, skipped: set[int]
) -> Iterator[tuple[Any, _Replace | None, str]]:
    """Yield all modules that a module holds, with the call that replaces each, and its place."""
    seen = set(skipped)
    stack: list[tuple[Any, str]] = [(root, type(root).__name__)]
    while stack:
        holder, place = stack.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        for value, replace, key in _held(holder):
            where = f"{place}{key}"
            if isinstance(value, nn.Module):
                yield value, replace, where
            stack.append((value, where))


def _held(holder: Any) -> Iterator[tuple[Any, _Replace | None, str]]:
    """Yield the values that a module, container or function holds."""
    if isinstance(holder, nn.Module):
        for key, value in list(vars(holder).items()):
            if key == "_modules":
                for name, child in list(value.items()):
                    yield child, partial(value.__setitem__, name), f".{name}"
            elif not _is_of_torch(key):
                yield value, partial(vars(holder).__setitem__, key), f".{key}"
    elif isinstance(holder, (list, deque)):
        for index, value in enumerate(holder):
            yield value, partial(holder.__setitem__, index), f"[{index}]"
    elif isinstance(holder, dict):
        for key, value in list(holder.items()):
            yield value, partial(holder.__setitem__, key), f"[{key!r}]"
    elif isinstance(holder, (tuple, set, frozenset)):
        for value in holder:
            yield value, None, " (a tuple or set)"
    elif isinstance(holder, FunctionType):
        for cell in holder.__closure__ or ():
            yield cell, None, " (a closure)"
        for value in (*(holder.__defaults__ or ()), *(holder.__kwdefaults__ or {}).values()):
            yield value, None, " (a default argument)"
    elif isinstance(holder, CellType):
        with suppress(ValueError):  # of an empty cell
            yield holder.cell_contents, partial(setattr, holder, "cell_contents"), ""
    elif isinstance(holder, MethodType):
        yield holder.__self__, None, " (a bound method)"
        yield holder.__func__, None, ""
    elif isinstance(holder, partial):
        for value in (holder.func, *holder.args, *holder.keywords.values()):
            yield value, None, " (a partial function)"
    elif isinstance(holder, weakref.ref):
        yield holder(), None, " (a weak reference)"
    elif not isinstance(holder, type):  # what else an object holds may be large, such as data
        for key, value in list(getattr(holder, "__dict__", {}).items()):
            if isinstance(value, nn.Module):
                yield value, partial(vars(holder).__setitem__, key), f".{key}"


def _is_of_torch(key: str) -> bool:
    """Return whether an attribute of a module has its tensors and hooks, which keep the layer."""
    return key in ("_parameters", "_buffers") or "_hook" in key or key.startswith("_ipa_")


def replace_by_adapter_layers(model: nn.Module, names: Iterable[str]) -> dict[str, AdapterLayer]:
    """Return the adapter layers of some names, after replacing the layers that are none yet."""
    layers = {name: model.get_submodule(name) for name in names}
    fresh = {
        layer: AdapterLayer(layer, pass_lock_of(model))
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


def restore_base_layers(model: nn.Module, layers: Iterable[AdapterLayer]) -> None:
    """Put base layers back in place of adapter layers."""
    layers = list(layers)
    for layer in layers:
        if layer.base_layer.training != layer.training:
            layer.base_layer.train(layer.training)
        if (noop := layer.__dict__.pop(_NOOP, None)) is not None:
            noop.remove()
        move_hooks(layer, layer.base_layer)
    replace_everywhere(model, {layer: layer.base_layer for layer in layers})


def _keep_off_fast_path(layer: AdapterLayer) -> None:
    """Register a hook, with which nn.TransformerEncoderLayer calls its layers.

    Without hooks it calls a fused kernel in evaluation mode, with the weights of its layers.
    """
    vars(layer)[_NOOP] = layer.register_forward_pre_hook(_noop_hook)


def _noop_hook(module: nn.Module, args: Any) -> None:
    return None
