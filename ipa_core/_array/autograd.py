"""Arrays outside any autograd graph."""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np

from ipa_core._array.types import Array


def detached(array: Array) -> Array:
    """Return an array outside any autograd graph, without the operators of a subclass."""
    if array_api_compat.is_torch_array(array):
        named = any(getattr(array, "names", ()))  # removed from recent versions of torch
        tensor: Any = array.detach()
        return tensor.rename(None) if named else tensor
    return np.asarray(array) if array_api_compat.is_numpy_array(array) else array
