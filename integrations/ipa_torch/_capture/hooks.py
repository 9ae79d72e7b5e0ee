"""Hooks on modules: registered and removed together, and their detection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.utils.hooks import RemovableHandle

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_hooks",
           "_global_backward_pre_hooks")  # fmt: skip


@dataclass(frozen=True)
class Hook:
    """Call before or after the forward of a module.

    Parameters
    ----------
    name : str or None
        Name by which the hook is removed before the others; None if it never is.
    module : torch.nn.Module
    call : callable
        ``call(module, args, kwargs)``, or ``call(module, args, kwargs, output)`` after the forward.
    after : bool, default False
        Call after the forward.
    first : bool, default False
        Call before the hooks that the module has.
    """

    name: str | None
    module: nn.Module
    call: Callable[..., Any]
    after: bool = False
    first: bool = False

    def register(self, call: Callable[..., Any]) -> RemovableHandle:
        """Register a call in place of the hook's."""
        module = self.module
        register = module.register_forward_hook if self.after else module.register_forward_pre_hook
        return register(call, with_kwargs=True, prepend=self.first)


class HookSet:
    """Hooks that are registered between ``__enter__`` and ``__exit__``: all, or none.

    Passes of other threads do not call them. A backward pass may run in another thread, and what it
    recomputes does.

    Parameters
    ----------
    hooks : iterable of Hook
        Several hooks may have the same name.

    Examples
    --------
    >>> layer = nn.ReLU()
    >>> with HookSet([Hook(None, layer, lambda module, args, kwargs: None)]):
    ...     len(layer._forward_pre_hooks)
    1
    >>> len(layer._forward_pre_hooks)
    0
    """

    def __init__(self, hooks: Iterable[Hook]) -> None:
        self._hooks = list(hooks)
        self._handles: dict[str | None, list[RemovableHandle]] = {}
        self._thread: int | None = None
        #: Names of hooks that other threads came by.
        self.elsewhere: set[str | None] = set()

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        try:
            for hook in self._hooks:
                handles = self._handles.setdefault(hook.name, [])
                handles += [hook.register(partial(self._call, hook))]
        except BaseException:
            self._remove_all()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._remove_all()
        except BaseException:  # an interruption
            self._remove_all()
            raise

    def _call(self, hook: Hook, *args: Any) -> Any:
        in_backward = torch._C._current_graph_task_id() != -1
        if threading.get_ident() == self._thread or in_backward:
            return hook.call(*args)
        self.elsewhere.add(hook.name)
        return None

    def remove(self, name: str | None) -> None:
        """Remove the hooks of a name, if they are registered."""
        for handle in self._handles.get(name, ()):
            handle.remove()
        self._handles.pop(name, None)

    def _remove_all(self) -> None:
        for name in list(self._handles):
            self.remove(name)


def has_hooks(module: nn.Module) -> bool:
    """Return whether any hook sees the input, output or gradients of a module.

    Examples
    --------
    >>> has_hooks(nn.Linear(2, 2))
    False
    """
    return any(getattr(module, name) for name in HOOKS) or any(
        getattr(global_hooks, name) for name in _GLOBAL
    )
