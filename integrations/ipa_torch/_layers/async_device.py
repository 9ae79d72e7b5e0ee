"""Devices that compute asynchronously to the host."""

from __future__ import annotations

import torch


def is_async_device(device: torch.device) -> bool:
    """Return whether a device computes asynchronously to the host."""
    return device.type != "cpu"
