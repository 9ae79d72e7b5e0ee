"""Whether two layers were given the same tensor."""

from __future__ import annotations

import weakref
from typing import TypeAlias

import torch

Key: TypeAlias = tuple[object, ...]


def storage_key(tensor: torch.Tensor) -> Key:
    """Return device and address of the memory that a tensor views."""
    return tensor.device, tensor.untyped_storage().data_ptr()


def tensor_key(tensor: torch.Tensor) -> Key:
    """Return what fixes a tensor's contents while it is alive: place, geometry and version."""
    return (
        *storage_key(tensor),
        tensor.storage_offset(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor._version,
    )


class TensorIds:
    """Numbers the tensors of a batch, the same number for the same live, unchanged contents.

    Tensors are held weakly: nothing outlives the forward pass because it was seen here. An address
    is trusted only while the tensor first seen there is alive and unchanged, as it is handed out
    again once that is freed. Tensors made in inference mode count no versions, so each is new.
    """

    def __init__(self) -> None:
        self._seen: dict[Key, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._count = 0

    def id_of(self, tensor: torch.Tensor) -> int:
        """Return the number of a tensor."""
        if tensor.is_inference():
            return self._next()
        key = tensor_key(tensor)
        if key in self._seen:
            reference, id_of = self._seen[key]
            first = reference()
            if first is not None and tensor_key(first) == key:
                return id_of
        id_of = self._next()
        self._seen[key] = (weakref.ref(tensor), id_of)
        return id_of

    def clear(self) -> None:
        """Forget the tensors of the batch that has ended."""
        self._seen.clear()

    def _next(self) -> int:
        self._count += 1
        return self._count
