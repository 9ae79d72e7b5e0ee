"""Autocast of a model: its dtype, and a context without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def no_grad_or_autocast(device: torch.device) -> Iterator[None]:
    """Disable gradients and the model's autocast.

    In half precision a learner's decomposition would lose its small singular values.
    """
    # Entered for each layer and batch: a context without an effect would cost time.
    active = autocast_dtype(device) is not None
    with torch.no_grad(), torch.autocast(device.type, enabled=False) if active else nullcontext():
        yield


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of the autocast that is active on a device, None without one."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
