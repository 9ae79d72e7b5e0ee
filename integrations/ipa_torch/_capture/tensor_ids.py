"""Identity of tensors within a batch: whether two layers have the same input."""

from __future__ import annotations

import weakref
from typing import TypeAlias

import torch

Key: TypeAlias = tuple[object, ...]


def storage_key(tensor: torch.Tensor) -> Key:
    """Return device and address of the memory that a tensor views."""
    return tensor.device, tensor.untyped_storage().data_ptr()


def tensor_key(tensor: torch.Tensor) -> Key:
    """Return a key of a live tensor's contents: memory, geometry and version."""
    return (
        *storage_key(tensor),
        tensor.storage_offset(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor._version,
    )


class TensorIds:
    """Numbers of the tensors of a batch, equal for the same live and unchanged contents.

    References are weak, so that no tensor outlives the forward pass. An address counts only while
    its first tensor is alive and unchanged, as the allocator reuses it afterwards. Tensors made in
    inference mode have no version counter; each gets a new number.
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
            reference, number = self._seen[key]
            first = reference()
            if first is not None and tensor_key(first) == key:
                return number
        number = self._next()
        self._seen[key] = (weakref.ref(tensor), number)
        return number

    def clear(self) -> None:
        """Forget the tensors of the batch that has ended."""
        self._seen.clear()

    def _next(self) -> int:
        self._count += 1
        return self._count
