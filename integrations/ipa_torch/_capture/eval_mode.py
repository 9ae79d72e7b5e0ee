"""Contexts of a forward pass: evaluation mode, and no autocast."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import nn


class _GlobalSwitches:
    """Switches of torch for the whole process, held while any fit of any thread runs.

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
                self._set()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._restore.close()

    def _set(self) -> None:
        # Where the compiler has not been loaded, which takes seconds, nothing is compiled.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            self._restore.enter_context(torch.compiler.set_stance("force_eager"))
        # The fused kernel of nn.TransformerEncoderLayer reads weights past the layers.
        fast = torch.backends.mha.get_fastpath_enabled()
        self._restore.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)


_SWITCHES = _GlobalSwitches()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and restore its state afterwards.

    Training flags (module by module) and the random states of host and CUDA devices are restored
    whatever happens. The flags are set without ``train()``, in which modules may merge weights. A
    compiled model runs eagerly: compiled code does not see new hooks.
    """
    flags = {module: module.training for module in model.modules()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.no_grad(), _SWITCHES.acquire():
        try:
            for module in flags:
                module.training = False
            yield
        finally:
            for module, training in flags.items():
                module.training = training


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Disable gradients and the model's autocast.

    In half precision a learner's decomposition would lose its small singular values.
    """
    kind = device.type
    # Entered for each layer and batch: a context without an effect would cost time.
    under_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.no_grad(), torch.autocast(kind, enabled=False) if under_autocast else nullcontext():
        yield
