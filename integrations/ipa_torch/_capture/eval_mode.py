"""Contexts of a forward pass: evaluation mode, and no autocast."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and restore its state afterwards.

    Training flags (module by module) and the random states of host and CUDA devices are restored,
    also after an exception. A compiled model runs eagerly: compiled code does not see new hooks.
    """
    flags = {module: module.training for module in model.modules()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        # Nothing is compiled unless the compiler is loaded; loading it takes seconds.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        fast = torch.backends.mha.get_fastpath_enabled()
        try:
            # The fused kernel of nn.TransformerEncoderLayer uses weights without calling layers.
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
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
