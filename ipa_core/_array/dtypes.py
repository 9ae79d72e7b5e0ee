"""Dtypes of any library: choice, names and casts."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import array_api_compat

from ipa_core._array.types import Array, Device, DType, Namespace
from ipa_core._torch_modes import torch_module

Value = TypeVar("Value")

HOST_DTYPES = frozenset(
    ("bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64")
    + ("uint8", "uint16", "uint32", "uint64")
)


def state_dtype(xp: Namespace, array: Array) -> DType:
    """Return the dtype of a learner's state: float64 for inputs wider than float32, else float32.

    Long doubles and other byte orders become the library's float64.
    """
    return xp.float64 if xp.finfo(array.dtype).bits > 32 else xp.float32


def _cached(function: Callable[[Namespace, Device], Value]) -> Callable[[Namespace, Device], Value]:
    """Keep the results of a function by the names of library and device: CuPy's have no hash."""
    known: dict[tuple[str, str], Value] = {}

    @wraps(function)
    def find(xp: Namespace, on: Device) -> Value:
        key = xp.__name__, str(on)
        if key not in known:
            known[key] = function(xp, on)
        return known[key]

    return find


@_cached
def wide_dtype(xp: Namespace, on: Device) -> DType:
    """Return float64 where library and device have it, else float32 (JAX by default, MPS)."""
    available = xp.__array_namespace_info__().dtypes(device=on, kind="real floating")
    return available.get("float64", xp.float32)


def wider_dtype(xp: Namespace, first: DType, second: DType) -> DType:
    """Return the dtype that two are promoted to; libraries promote none of 8 bits."""
    if xp.finfo(first).bits == 8:
        return xp.float32 if xp.finfo(second).bits == 8 else second
    return first if xp.finfo(second).bits == 8 else xp.result_type(first, second)


def half_dtype(xp: Namespace, on: Device) -> DType | None:
    """Return bfloat16 where the device multiplies it faster than float32, else None.

    Known through torch of processors with bfloat16 instructions, and of CUDA devices with bfloat16
    matrix units (compute capability 8.0 and above). ROCm devices, of which some refuse such
    products, are not among them.
    """
    if not array_api_compat.is_torch_namespace(xp):
        return None
    torch = torch_module()
    return torch.bfloat16 if _is_fast_in_half(torch, on) else None


@_cached
def _is_fast_in_half(torch: Any, on: Any) -> bool:
    if on.type == "cuda":  # ROCm's devices, too
        return torch.version.hip is None and torch.cuda.get_device_capability(on) >= (8, 0)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return on.type == "cpu" and supported is not None and bool(supported())


def dtype_name(dtype: DType) -> str:
    """Return a dtype's name in the array API, such as "float32"."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
    return str(name or str(dtype).rpartition(".")[2])


def available_dtype(xp: Namespace, dtype: DType, on: Device | None) -> DType:
    """Return the dtype of the same name in another library, or float32 in place of a float."""
    name = dtype_name(dtype)
    available = xp.__array_namespace_info__().dtypes(device=on)
    half = {"bfloat16", "float16"}  # not in the standard, but in some libraries
    if name in available or (name in half and hasattr(xp, name)):
        return getattr(xp, name)
    return xp.float32


def half_matmul(left: Array, right: Array) -> Array:
    """Return a product of torch matrices in half precision, summed in float32.

    The result is float32 on CUDA, where torch can return the sums as they are (torch 2.8 and
    above), and rounded elsewhere.
    """
    torch = torch_module()
    if left.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def cast(xp: Namespace, array: Array, dtype: DType) -> Array:
    return array if array.dtype == dtype else xp.astype(array, dtype)
