"""Digest of a sequence of batches, to compare those of a resumed run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ipa_core.caller_warnings import warn_caller
from ipa_torch._fit.tensor_digest import tensor_parts

_PLAIN = (str, bytes, bytearray, int, float, complex, bool, type(None), type(...))


def chained(before: str, batch: Any) -> str:
    """Return the digest of a batch and of the digest before it.

    It covers each tensor's dtype, shape and some 4,096 evenly spaced entries: enough to detect
    another order of the data, and cheap beside a forward pass. Objects of other classes are
    covered by the state with which they are pickled.

    Warns
    -----
    UserWarning
        If a part of the batch has no such state, and is covered by its class only.

    Examples
    --------
    >>> zeros, ones = torch.zeros(3), torch.ones(3)
    >>> chained(chained("", zeros), ones) == chained(chained("", ones), zeros)
    False
    """
    total = hashlib.sha256(before.encode())
    for part in _parts(batch, ()):
        total.update(part)
    return total.hexdigest()


def _parts(value: Any, above: tuple[int, ...]) -> Iterator[bytes]:
    """Yield the bytes that a digest covers; ``above`` are the objects that contain the value."""
    yield f"\n{type(value).__qualname__} ".encode()
    if id(value) in above:
        yield str(above.index(id(value))).encode()
        return
    above = (*above, id(value))
    if isinstance(value, torch.Tensor):
        yield from tensor_parts(value)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        yield from tensor_parts(_as_tensor(value))
    elif isinstance(value, np.ndarray):
        yield from _parts([str(value.dtype), *value.shape, *value.ravel().tolist()], above)
    elif isinstance(value, _PLAIN):
        yield repr(value).encode()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _parts(key, above)
            yield from _parts(item, above)
    elif isinstance(value, (tuple, list)):
        yield str(len(value)).encode()
        for item in value:
            yield from _parts(item, above)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(b"".join(_parts(item, above)) for item in value)
    else:
        yield from _object_parts(value, above)


def _object_parts(value: Any, above: tuple[int, ...]) -> Iterator[bytes]:
    if isinstance(value, type) or hasattr(value, "__qualname__"):  # a class or function
        yield f"{value.__module__}.{value.__qualname__}".encode()
        return
    try:
        state = value.__reduce_ex__(4)
    except Exception:  # of the object's class
        warn_caller(
            f"expected batches that can be digested, got a {type(value).__name__} that cannot be "
            "pickled: other batches in its place are not detected when a run resumes",
        )
        return
    if isinstance(state, str):
        yield state.encode()
        return
    for item in state:
        is_iterator = item is not None and hasattr(item, "__next__")
        yield from _parts(list(item) if is_iterator else item, above)


def _as_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if native.dtype.itemsize > 8:  # long doubles
        native = native.astype(np.float64)
    return torch.from_numpy(np.ascontiguousarray(native))
