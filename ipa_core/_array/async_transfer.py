"""Transfer from a device to the host that the computation does not wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import array_api_compat
import numpy as np

from ipa_core._array.dtypes import cast
from ipa_core._array.transfer import on_host
from ipa_core._array.types import Array, Device, HostArray, Namespace
from ipa_core._sparse_rows import is_sparse, squared_lengths
from ipa_core._torch_modes import torch_module


def squared_norms_async(xp: Namespace, matrices: Sequence[Array]) -> Callable[[], list[HostArray]]:
    """Ask for the squared lengths of the rows of matrices; the call of the result waits for them.

    All travel in one transfer. Each is one pass without a temporary: NumPy's ``vecdot`` does that;
    torch's builds the products first and takes up to fifty times as long as its norm.
    """
    if array_api_compat.is_numpy_namespace(xp):
        squares = [
            squared_lengths(rows) if is_sparse(rows) else on_host(xp.vecdot(rows, rows))
            for rows in matrices
        ]
        return lambda: squares
    if not matrices:
        return list
    lengths = [xp.linalg.vector_norm(_single(xp, rows), axis=-1) for rows in matrices]
    read = to_host_async(lengths[0] if len(lengths) == 1 else xp.concat(lengths))
    ends = list(accumulate(int(rows.shape[0]) for rows in matrices))
    return lambda: np.split(read() ** 2, ends[:-1])


def _single(xp: Namespace, rows: Array) -> Array:
    """Return rows in float32 at least: lengths in half precision would have two digits."""
    return rows if rows.dtype == xp.float64 else cast(xp, rows, xp.float32)


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
