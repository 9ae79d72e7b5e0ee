"""Lock between forward passes of a model and changes of its adapters in other threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, cast

import torch
from torch import nn

from ipa_core.errors import SettingError
from ipa_torch._layers.unwrap import unwrap_model

#: Name of the attribute of a model with its lock.
_LOCK = "_ipa_pass_lock"

_PATIENCE = 60.0


class PassLock:
    """Lock that any number of forward passes share, and that a change has alone.

    A change waits until the passes that run have ended; passes that begin meanwhile wait for the
    change. So each pass sees all layers as they were before, or all as they are after. A copy of a
    model gets a lock of its own.

    Examples
    --------
    >>> lock = PassLock()
    >>> lock.enter_pass(), lock.in_pass, lock.leave_pass(), lock.in_pass
    (None, True, None, False)
    """

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._passes: dict[int, int] = {}
        #: Threads whose pass began with a call of the model. torch calls no hook at the end of a
        #: pass that a KeyboardInterrupt ends; the stack of the thread shows it then.
        self._called: set[int] = set()
        self._changing: int | None = None
        self._changes_queued = 0

    def __reduce__(self) -> tuple[type[PassLock], tuple[()]]:
        return PassLock, ()

    @property
    def in_pass(self) -> bool:
        """True within a pass of this thread."""
        return threading.get_ident() in self._passes

    def enter_pass(self) -> None:
        """Begin a pass of the whole model; changes that wait come first."""
        self._enter(lambda: self._changing is None and not self._changes_queued)

    def enter_layer(self) -> None:
        """Begin a pass of a single layer, perhaps for a pass of the model in another thread."""
        self._enter(lambda: self._changing is None)

    def leave_pass(self) -> None:
        """End a pass."""
        thread = threading.get_ident()
        with self._condition:
            depth = self._passes.pop(thread, 1) - 1
            if depth:
                self._passes[thread] = depth
                return
            self._called.discard(thread)
            if self._changes_queued:
                self._condition.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        """Enclose a change.

        Raises
        ------
        SettingError
            If passes of other threads do not end within a minute.
        """
        thread = threading.get_ident()
        if self._changing == thread:  # a change within a change
            yield
            return
        try:
            with self._condition:
                self._changes_queued += 1
                try:
                    free = self._condition.wait_for(lambda: self._is_free(thread), _PATIENCE)
                finally:
                    self._changes_queued -= 1
                    self._condition.notify_all()
                if not free:
                    raise SettingError(
                        f"expected forward passes of other threads to end within {_PATIENCE:.0f} "
                        f"seconds, got {len(self._passes)} that still run; stop serving first"
                    )
                self._changing = thread
            yield
        finally:
            with self._condition:
                if self._changing == thread:
                    self._changing = None
                    self._condition.notify_all()

    def _enter(self, free: Any) -> None:
        thread = threading.get_ident()
        with self._condition:
            depth = self._passes.get(thread, 0)
            if not depth and self._changing != thread:
                self._condition.wait_for(free)
            self._passes[thread] = depth + 1

    def _is_free(self, thread: int) -> bool:
        if others := self._called - {thread}:
            stacks = sys._current_frames()
            for other in others:
                if not any(_module_calls(stacks.get(other))):
                    self._forget(other)
        return self._changing is None and not self._passes.keys() - {thread}

    def _forget(self, thread: int) -> None:
        """Remove a pass that was interrupted."""
        self._called.discard(thread)
        self._passes.pop(thread, None)

    # Hooks of the model. Compiled code has no use for them: it is compiled anew after a change.

    def pre_hook(self, module: nn.Module, args: Any) -> None:
        """Begin a pass."""
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        if thread in self._called:
            calls = _module_calls(sys._getframe())
            if sum(called is module for called in calls) == 1:
                self._forget(thread)
        self.enter_pass()
        if self._passes[thread] == 1:
            self._called.add(thread)

    def post_hook(self, module: nn.Module, args: Any, output: Any) -> None:
        """End a pass, also after an exception."""
        if not torch.compiler.is_compiling():
            self.leave_pass()


def _module_calls(frame: FrameType | None) -> Iterator[object]:
    """Yield the modules whose calls are on a stack, the innermost first."""
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            yield frame.f_locals.get("self")
        frame = frame.f_back


@contextmanager
def changing(model: nn.Module) -> Iterator[None]:
    """Enclose a change of adapters: passes of other threads end before it or begin after it.

    The passes are those of the module that adapters were attached to, and of single layers.
    """
    locks = {
        id(lock): lock
        for module in unwrap_model(model).modules()
        if isinstance(lock := getattr(module, "pass_lock", None), PassLock)
    }
    with ExitStack() as stack:
        for key in sorted(locks):
            stack.enter_context(locks[key].change())
        yield


def pass_lock_of(model: nn.Module) -> PassLock:
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
