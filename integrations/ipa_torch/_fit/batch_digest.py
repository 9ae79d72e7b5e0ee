"""Whether a run sees the batches that an earlier one saw."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ipa_torch._layers.row_samples import strided_sample

_ENTRIES = 4096


def chained(before: str, batch: Any) -> str:
    """Return a digest of a batch and of the digest of those before it.

    Of each tensor its dtype, its shape and some 4,096 entries are looked at, spread evenly: enough
    to tell another order of the data, and cheap beside a forward pass.

    Examples
    --------
    >>> one, other = torch.zeros(3), torch.ones(3)
    >>> chained(chained("", one), other) == chained(chained("", other), one)
    False
    """
    total = hashlib.sha256(before.encode())
    _feed(total, batch)
    return total.hexdigest()


def _feed(total: Any, value: Any) -> None:
    total.update(f"\n{type(value).__name__} ".encode())
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        total.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        flat = value.detach().reshape(-1)
        some = strided_sample(flat, _ENTRIES).cpu().contiguous()
        total.update(some.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        _feed(total, torch.as_tensor(value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            total.update(repr(key).encode())
            _feed(total, item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _feed(total, item)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        total.update(repr(value).encode())
