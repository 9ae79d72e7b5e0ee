"""Namespace, device and description of an array of any library."""

from __future__ import annotations

import reprlib
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

from ipa_core._array.conversion_hints import conversion_hint
from ipa_core._array.types import Array, Device, Namespace
from ipa_core.errors import ArrayTypeError, SettingError


def namespace(*arrays: Array) -> Namespace:
    """Return the array-API namespace that all ``arrays`` share."""
    for array in arrays:
        if not is_array(array):
            raise ArrayTypeError(
                f"expected an array of an array-API library, got {type(array).__name__}; "
                f"{conversion_hint(array) or 'convert it first, for example with numpy.asarray'}"
            )
    try:
        return array_api_compat.array_namespace(*arrays)
    except TypeError as error:
        kinds = ", ".join(sorted({type(array).__module__.split(".")[0] for array in arrays}))
        raise ArrayTypeError(f"expected arrays of one library, got {kinds}") from error


def as_namespace(library: ModuleType | Namespace) -> Namespace:
    """Return the array-API namespace of a library given as a module (``torch``, ``numpy``)."""
    if getattr(library, "__name__", None) in ("numpy", "torch", "cupy"):
        return array_api_compat.array_namespace(library.zeros(0))
    if not callable(getattr(library, "__array_namespace_info__", None)):
        raise SettingError(
            "expected the module of an array library (numpy, torch, cupy, jax.numpy), got "
            f"{reprlib.repr(library)}"
        )
    return library


def is_array(value: object) -> bool:
    return not isinstance(value, type) and bool(array_api_compat.is_array_api_obj(value))


def detached(array: Array) -> Array:
    """Return an array outside any autograd graph, without the operators of a subclass."""
    if array_api_compat.is_torch_array(array):
        named = any(getattr(array, "names", ()))  # removed from recent versions of torch
        tensor: Any = array.detach()
        return tensor.rename(None) if named else tensor
    return np.asarray(array) if array_api_compat.is_numpy_array(array) else array


def device(array: Array) -> Device:
    return array_api_compat.device(array)


def describe(array: Array) -> str:
    """Return library, dtype and device in words."""
    return f"{type(array).__module__.split('.')[0]} {array.dtype} on {device(array)}"
