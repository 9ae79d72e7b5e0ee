"""Inspection of an object: whether it is an array, its device, and a description."""

from __future__ import annotations

import array_api_compat

from ipa_core._array.types import Array, Device


def is_array(value: object) -> bool:
    return not isinstance(value, type) and bool(array_api_compat.is_array_api_obj(value))


def device(array: Array) -> Device:
    return array_api_compat.device(array)


def describe(array: Array) -> str:
    """Return library, dtype and device in words."""
    return f"{type(array).__module__.split('.')[0]} {array.dtype} on {device(array)}"
