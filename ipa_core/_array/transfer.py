"""Transfer of arrays between libraries, devices and the host."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import array_api_compat
import numpy as np

from ipa_core._array.dtypes import HOST_DTYPES, available_dtype, cast, dtype_name
from ipa_core._array.inspection import is_array
from ipa_core._array.types import Array, Device, DType, HostArray, Namespace
from ipa_core._torch_modes import recorded_nowhere, torch_module
from ipa_core.errors import SettingError


def on_host(array: Array) -> HostArray:
    """Return a float64 copy on the host, for the sums that control the computation."""
    return np.array(to_numpy(array), dtype=np.float64)


def to_numpy(array: Array) -> Any:
    """Return a NumPy copy or view of ``array``, from any device; bfloat16 becomes float32."""
    if array_api_compat.is_numpy_array(array):
        return array
    if array_api_compat.is_torch_array(array):
        tensor = array.detach().resolve_neg().cpu()  # `imag` of a conjugate is negated lazily
        known = dtype_name(tensor.dtype) in HOST_DTYPES
        return (tensor if known else tensor.float()).numpy()
    if array_api_compat.is_cupy_array(array):
        return array.get()
    if array_api_compat.is_jax_array(array):
        host = np.asarray(array)
        return host if dtype_name(host.dtype) in HOST_DTYPES else host.astype(np.float32)
    return np.from_dlpack(array)


def host_values(values: Any) -> list[Any]:
    """Return the items of an array of any library, or of a sequence, on the host."""
    return list(to_numpy(values) if is_array(values) else values)


def from_numpy(xp: Namespace, array: Any, on: Device | None, dtype: DType) -> Array:
    """Return a copy of a NumPy ``array`` in library ``xp`` on device ``on``.

    The cast is on the host, as the device may not have the dtype of ``array``.
    """
    name = dtype_name(dtype)
    host = np.array(array, dtype=name if name in HOST_DTYPES else np.float32)
    return cast(xp, xp.asarray(host, device=on), dtype)


def index_array(xp: Namespace, places: Any, on: Device) -> Array:
    """Return indices on a device, in the dtype that the device has for them."""
    defaults = xp.__array_namespace_info__().default_dtypes(device=on)
    return from_numpy(xp, places, on, defaults["indexing"])


def convert(array: Array, xp: Namespace, on: Device | None, dtype: DType | None) -> Array:
    """Return ``array`` in library ``xp``, by way of the host.

    Without a ``dtype`` it keeps its own, or takes the library's float32 where library or device has
    none such (float64 on many accelerators, bfloat16 in NumPy).

    Raises
    ------
    SettingError
        If the library has no such device or dtype.
    """
    with recorded_nowhere() if array_api_compat.is_torch_namespace(xp) else nullcontext():
        try:
            if dtype is None:
                dtype = available_dtype(xp, array.dtype, on)
            return from_numpy(xp, to_numpy(array), on, dtype)
        except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            raise SettingError(
                f"expected a device and a dtype of {xp.__name__}, got device={on!r} and "
                f"dtype={dtype!r}: {error}"
            ) from error


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
