"""Array-API namespace of arrays and of libraries."""

from __future__ import annotations

import reprlib
from types import ModuleType

import array_api_compat

from ipa_core._array.conversion_hints import conversion_hint
from ipa_core._array.inspection import is_array
from ipa_core._array.types import Array, Namespace
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
