"""Hooks of a layer that gets an adapter: they act on the adapted layer as a whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ipa_torch._capture.hooks import HOOKS

#: Attributes of a module with its hooks, and what torch notes about them.
HOOK_ATTRIBUTES = (
    *HOOKS,
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Move all hooks from one module to another; each is still given the module it was set on.

    The dictionaries themselves change place, so that handles still remove their hooks.
    """
    for name in HOOK_ATTRIBUTES:
        moved, others = getattr(source, name), getattr(target, name)
        setattr(source, name, others)
        setattr(target, name, moved)
    for name in HOOKS:
        hooks = getattr(target, name)
        for key, hook in hooks.items():
            hooks[key] = hook.args[0] if _is_bound(hook) else partial(_call_with, hook, source)


def _is_bound(hook: Callable[..., Any]) -> bool:
    return isinstance(hook, partial) and hook.func is _call_with


def _call_with(hook: Callable[..., Any], module: nn.Module, _: nn.Module, *args: Any) -> Any:
    return hook(module, *args)
