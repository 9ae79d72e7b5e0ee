"""Digest of a sequence of batches, to compare those of a resumed run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from ipa_torch._layers.row_samples import strided_sample

_ENTRIES = 4096


def chained(before: str, batch: Any) -> str:
    """Return the digest of a batch and of the digest before it.

    It covers each tensor's dtype, shape and some 4,096 evenly spaced entries: enough to detect
    another order of the data, and cheap beside a forward pass.

    Examples
    --------
    >>> zeros, ones = torch.zeros(3), torch.ones(3)
    >>> chained(chained("", zeros), ones) == chained(chained("", ones), zeros)
    False
    """
    total = hashlib.sha256(before.encode())
    _add(total, batch)
    return total.hexdigest()


def _add(total: Any, value: Any) -> None:
    total.update(f"\n{type(value).__name__} ".encode())
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        total.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        flat = value.detach().reshape(-1)
        sample = strided_sample(flat, _ENTRIES).cpu().contiguous()
        total.update(sample.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        _add(total, torch.as_tensor(value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            total.update(repr(key).encode())
            _add(total, item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _add(total, item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            _add(total, getattr(value, field.name))
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        total.update(repr(value).encode())
