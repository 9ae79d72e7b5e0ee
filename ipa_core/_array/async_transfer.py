"""Transfer from a device to the host that the computation does not wait for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import array_api_compat

from ipa_core._array.transfer import on_host
from ipa_core._array.types import Array, Device, HostArray
from ipa_core._torch_modes import torch_module


def to_host_async(array: Array) -> Callable[[], HostArray]:
    """Start to copy an array to the host; the returned callable waits for the copy.

    On an accelerator of torch with streams (CUDA, ROCm, XPU, NPU) it waits for an event, not for
    the device, which continues with later work. JAX is asynchronous by itself.
    """
    if array_api_compat.is_torch_array(array) and _has_streams(array.device):
        torch = torch_module()
        host = torch.empty(array.shape, dtype=array.dtype, device="cpu", pin_memory=True)
        host.copy_(array.detach(), non_blocking=True)
        arrived = _accelerator().current_stream(array.device).record_event()

        def read() -> HostArray:
            arrived.synchronize()
            return on_host(host)

        return read
    return partial(on_host, array)


def _has_streams(on: Device) -> bool:
    """Return whether a device of torch is an accelerator with streams; MPS shares its memory."""
    return on.type not in ("cpu", "mps") and on.type == _accelerator_type()


def _accelerator() -> Any:
    """Return torch's module of accelerators, which is that of CUDA before torch 2.6."""
    return getattr(torch_module(), "accelerator", torch_module().cuda)


def _accelerator_type() -> str | None:
    if _accelerator() is torch_module().cuda:
        return "cuda"
    current = _accelerator().current_accelerator()
    return None if current is None else str(current.type)
