"""Evaluation mode of a model in a forward pass, with the random states kept."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ipa_torch._layers.random_state import get_random_state, set_random_state


class _GlobalState:
    """Random states and switches of torch, held while any fit of any thread runs.

    The first fit sets them and the last one restores them: if each restored what it had found, fits
    that overlap would leave them set.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holders: set[object] = set()
        #: Calls that restore what was found, each of which may be repeated.
        self._restore: list[Callable[[], object]] = []

    @contextmanager
    def acquire(self) -> Iterator[None]:
        holder = object()
        try:
            with self._lock:
                self._holders.add(holder)
                if len(self._holders) == 1:
                    self._set()
            yield
        finally:
            try:
                self._release(holder)
            except BaseException:  # an interruption
                self._release(holder)
                raise

    def _release(self, holder: object) -> None:
        with self._lock:
            self._holders.discard(holder)
            while self._restore and not self._holders:
                self._restore[-1]()
                self._restore.pop()

    def _set(self) -> None:
        self._restore.append(_random_states())
        # Where the compiler has not been loaded, which takes seconds, nothing is compiled.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stance: Any = torch.compiler.set_stance
            self._restore.append(partial(stance("force_eager").__exit__, None, None, None))
        # The fused kernel of nn.TransformerEncoderLayer reads weights past the layers.
        fast = torch.backends.mha.get_fastpath_enabled()
        self._restore.append(partial(torch.backends.mha.set_fastpath_enabled, fast))
        torch.backends.mha.set_fastpath_enabled(False)


class _TrainingFlags:
    """Training flags of modules, which the last fit of a module restores."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        #: Flag of a module by its id, and the fits that hold it.
        self._held: dict[int, tuple[bool, set[object]]] = {}

    @contextmanager
    def cleared(self, modules: list[nn.Module]) -> Iterator[None]:
        holder = object()
        try:
            with self._lock:
                for module in modules:
                    _, holders = self._held.setdefault(id(module), (module.training, set()))
                    holders.add(holder)
                    module.training = False
            yield
        finally:
            try:
                self._release(modules, holder)
            except BaseException:  # an interruption
                self._release(modules, holder)
                raise

    def _release(self, modules: list[nn.Module], holder: object) -> None:
        """Restore the flags of those modules that no other fit holds."""
        with self._lock:
            for module in modules:
                training, holders = self._held.get(id(module), (False, {holder}))
                holders.discard(holder)
                if not holders and id(module) in self._held:
                    module.training = training
                    del self._held[id(module)]


_GLOBAL_STATE, _TRAINING_FLAGS = _GlobalState(), _TrainingFlags()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and restore its state afterwards.

    Training flags (module by module) and the random states of host and accelerator are restored
    whatever happens, by the last of several threads. The flags are set without ``train()``, in
    which modules may merge weights. A compiled model runs eagerly: compiled code does not see new
    hooks.
    """
    modules = list(model.modules())
    with torch.no_grad(), _GLOBAL_STATE.acquire(), _TRAINING_FLAGS.cleared(modules):
        yield


def _random_states() -> Callable[[], None]:
    """Return a call that restores the random states of host and accelerator, if it is in use."""
    has_any = hasattr(torch, "accelerator")  # since torch 2.6
    accelerator = torch.accelerator.current_accelerator() if has_any else torch.device("cuda")
    module = getattr(torch, "cuda" if accelerator is None else accelerator.type)
    in_use = hasattr(module, "is_initialized") and module.is_initialized()  # not MPS
    states = [module.get_rng_state(n) for n in range(module.device_count())] if in_use else []
    host = get_random_state()

    def restore() -> None:
        set_random_state(host)
        for number, state in enumerate(states):
            module.set_rng_state(state, number)

    return restore
