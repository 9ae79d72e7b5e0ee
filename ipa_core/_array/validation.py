"""Validation of arrays."""

from __future__ import annotations

import array_api_compat
import numpy as np

from ipa_core._array.conversion_hints import conversion_hint
from ipa_core._array.inspection import describe, device, is_array
from ipa_core._array.namespaces import namespace
from ipa_core._array.types import Array, Namespace
from ipa_core._torch_modes import torch_module
from ipa_core.errors import ArrayTypeError


def check_array(array: Array) -> Namespace:
    """Return the namespace of an array of dense real floating values.

    Raises
    ------
    ArrayTypeError
        If the object is anything else; the message says how to convert it.
    """
    xp = namespace(array)
    if form := _unsupported_form(array):
        raise ArrayTypeError(f"expected a dense array with values, got {form}")
    if xp.isdtype(array.dtype, "complex floating"):
        raise ArrayTypeError(
            f"expected a real floating dtype, got {array.dtype}; pass real and imaginary parts as "
            "features, concatenated along the last axis"
        )
    if not xp.isdtype(array.dtype, "real floating"):
        raise ArrayTypeError(
            f"expected a real floating dtype, got {array.dtype}; convert it to float32 first"
        )
    return xp


def check_materialized(array: Array) -> None:
    """Check that the values of an array are in the memory of this process, as tensors of torch are.

    Raises
    ------
    ArrayTypeError
        If the array is a tensor of another class, such as `DTensor`, or `torch.func` transforms it.
    """
    if not array_api_compat.is_torch_array(array):
        return
    torch, kind = torch_module(), type(array)
    if torch._C._functorch.is_functorch_wrapped_tensor(array):
        raise ArrayTypeError("expected a tensor with values, got one within torch.func; return it")
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        whole = hasattr(array, "full_tensor")
        raise ArrayTypeError(
            f"expected a tensor with values, got a {kind.__name__}; "
            f"{'pass x.full_tensor()' if whole else 'pass its values as a torch.Tensor'}"
        )


def _unsupported_form(array: Array) -> str | None:
    """Return what is not supported about an array, and the cure; None for a dense array."""
    if hasattr(array, "__dask_graph__"):
        return f"a Dask array; {conversion_hint(array)}"
    if array_api_compat.is_numpy_array(array):
        if isinstance(array, np.ma.MaskedArray):
            return "a masked array; pass x.filled(0) with weights ~x.mask.any(axis=-1)"
        return None
    if not array_api_compat.is_torch_array(array):
        return None
    if hasattr(array, "get_mask"):
        return "a masked tensor; pass x.to_tensor(0) with row weights"
    if array.is_nested:
        return "a nested tensor; pass a list of its parts, x.unbind()"
    if array.layout != torch_module().strided:
        return "a sparse tensor; pass x.to_dense()"
    if array.is_meta:
        return "a tensor on the meta device, which has no values; load it first"
    return None


def check_home(first: Array, second: Array, cure: str) -> Namespace:
    """Return the namespace that two arrays share, if they are on one device, too.

    Raises
    ------
    ArrayTypeError
        If library or device differ.
    """
    same = is_array(first) and is_array(second)
    same = same and array_api_compat.array_namespace(first) is array_api_compat.array_namespace(
        second
    )
    if not same or device(first) != device(second):
        raise ArrayTypeError(
            f"expected arrays of one library and device, {describe(first)}, "
            f"got {describe(second)}; {cure}"
        )
    return namespace(first)
