"""Running a model without leaving a trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, then leave all as it was.

    Training flags (module by module) and the random states of host and CUDA devices are restored
    whatever happens. A compiled model runs eagerly: compiled code does not see new hooks.
    """
    flags = {module: module.training for module in model.modules()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        # Where the compiler has not been loaded, which takes seconds, nothing is compiled.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        fast = torch.backends.mha.get_fastpath_enabled()
        try:
            # The fused kernel of nn.TransformerEncoderLayer reads weights past the layers.
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, training in flags.items():
                module.training = training


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Compute without gradients and outside the model's autocast.

    Products in half precision would lose the small core of a learner's decomposition.
    """
    kind = device.type
    # Entered for every layer and batch: a context that changes nothing is not worth its time.
    under_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.no_grad(), torch.autocast(kind, enabled=False) if under_autocast else nullcontext():
        yield
