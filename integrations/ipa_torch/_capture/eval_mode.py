"""Evaluation mode of a model in a forward pass, with the random states kept."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn


class _GlobalState:
    """Random states and switches of torch, held while any fit of any thread runs.

    The first fit sets them and the last one restores them: if each restored what it had found, fits
    that overlap would leave them set.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._restore = ExitStack()

    @contextmanager
    def acquire(self) -> Iterator[None]:
        with self._lock:
            if not self._holders:
                try:
                    self._set()
                except BaseException:
                    self._restore.close()
                    raise
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._restore.close()

    def _set(self) -> None:
        self._restore.enter_context(_random_states_kept())
        # Where the compiler has not been loaded, which takes seconds, nothing is compiled.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            self._restore.enter_context(torch.compiler.set_stance("force_eager"))
        # The fused kernel of nn.TransformerEncoderLayer reads weights past the layers.
        fast = torch.backends.mha.get_fastpath_enabled()
        self._restore.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)


class _TrainingFlags:
    """Training flags of modules, which the last fit of a module restores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, tuple[int, bool]] = {}

    @contextmanager
    def cleared(self, modules: list[nn.Module]) -> Iterator[None]:
        cleared: list[nn.Module] = []
        try:
            with self._lock:
                for module in modules:
                    key = id(module)
                    holders, training = self._held.get(key, (0, module.training))
                    cleared.append(module)
                    self._held[key] = holders + 1, training
                    module.training = False
            yield
        finally:
            try:
                self._restore(cleared)
            except BaseException:  # an interruption
                self._restore(cleared)
                raise

    def _restore(self, cleared: list[nn.Module]) -> None:
        """Take modules from a list, and restore the flags of those that no other fit holds."""
        with self._lock:
            while cleared:
                key = id(cleared[-1])
                module, (holders, training) = cleared.pop(), self._held[key]
                if holders > 1:
                    self._held[key] = holders - 1, training
                else:
                    del self._held[key]
                    module.training = training


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


def _random_states_kept() -> AbstractContextManager[None]:
    """Return a context that restores the random states of host and accelerator, if it is in use."""
    has_any = hasattr(torch, "accelerator")  # since torch 2.6
    accelerator = torch.accelerator.current_accelerator() if has_any else torch.device("cuda")
    kind = "cuda" if accelerator is None else accelerator.type
    module = getattr(torch, kind)
    in_use = hasattr(module, "is_initialized") and module.is_initialized()  # not MPS
    return torch.random.fork_rng(range(module.device_count()) if in_use else (), device_type=kind)
