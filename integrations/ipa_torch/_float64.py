"""float64 on devices that may not have it."""

from __future__ import annotations

from functools import cache

import torch


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64: on its device, or on the host where the device has none (MPS).

    Examples
    --------
    >>> in_float64(torch.ones(2, dtype=torch.bfloat16)).dtype
    torch.float64
    """
    return (tensor if _has_float64(tensor.device) else tensor.cpu()).double()


@cache
def _has_float64(device: torch.device) -> bool:
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True
