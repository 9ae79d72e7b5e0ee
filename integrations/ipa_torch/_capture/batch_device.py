"""Device of a model, and batches on it."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import nn

from ipa_core.errors import ArrayTypeError


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the first tensor that is not on the meta device; None without any.

    Offloaded weights are on the meta device until their layer runs.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if not tensor.is_meta:
            return tensor.device
    return None


def on_device(batch: Any, device: torch.device | None) -> Any:
    """Return a batch with its tensors, also nested ones, on ``device``, in containers of its types.

    Mappings, lists, tuples and dataclasses are copied, not changed; other objects are moved by
    their method ``to``, if they have it.
    """
    if device is None:
        return batch
    if isinstance(batch, torch.Tensor):
        if batch.is_meta:
            raise ArrayTypeError("expected a batch with values, got one on the meta device")
        # A copy to the host must be synchronous.
        return batch.to(device, non_blocking=device.type != "cpu")
    # Before other containers: a PackedSequence is a tuple of which a part stays on the host. The
    # `to` of a BatchEncoding leaves nested tensors behind.
    if callable(getattr(batch, "to", None)) and not isinstance(batch, (UserDict, type)):
        return copy.copy(batch).to(device)
    if isinstance(batch, Mapping):
        return _rebuilt_mapping(
            batch, {key: on_device(value, device) for key, value in batch.items()}
        )
    if isinstance(batch, (tuple, list)):
        return _rebuilt_sequence(batch, [on_device(value, device) for value in batch])
    if is_dataclass(batch) and not isinstance(batch, type):
        moved = copy.copy(batch)  # not `replace`, which runs __init__ again
        for field in fields(batch):
            object.__setattr__(moved, field.name, on_device(getattr(batch, field.name), device))
        return moved
    return batch


def _rebuilt_mapping(like: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return a mapping of the same type with other values."""
    if isinstance(like, MutableMapping):
        moved = copy.copy(like)
        for key, value in items.items():  # some have no `update`
            moved[key] = value
        return moved
    kind: Any = type(like)
    try:
        return cast(Mapping[Any, Any], kind(items))
    except TypeError as error:
        raise ArrayTypeError(
            f"expected a mapping that can be made from a dict as batch, got {kind.__name__}: "
            f"{error}; pass dicts"
        ) from error


def _rebuilt_sequence(like: Sequence[Any], items: list[Any]) -> Sequence[Any]:
    """Return a list or tuple of the same type with other items."""
    if isinstance(like, list):
        moved = copy.copy(like)
        moved[:] = items
        return moved
    make: Any = getattr(like, "_make", type(like))  # of a namedtuple
    return cast(Sequence[Any], make(items))
