"""Identity of tensors within a batch: whether two layers have the same input."""

from __future__ import annotations

import weakref
from typing import TypeAlias

import torch

Key: TypeAlias = tuple[object, ...]

_SAMPLED = 4096
_PRIME = 2_654_435_761


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


def sample_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of 4,096 entries of a tensor, spread over rows and columns; all if fewer.

    Examples
    --------
    >>> sample_bytes(torch.zeros(3)) == sample_bytes(torch.tensor([0.0, 1.0, 0.0]))
    False
    """
    entries = tensor.detach().reshape(-1)
    if len(entries) > _SAMPLED:
        # A prime step meets every column, which an even step need not.
        steps = torch.arange(_SAMPLED, device=tensor.device) * _PRIME
        entries = entries[steps % len(entries)]
    entries = entries.resolve_neg().cpu().contiguous()  # `imag` of a conjugate is lazily negated
    return entries.view(torch.uint8).numpy().tobytes()


class TensorIds:
    """Numbers of the tensors of a batch, equal for the same live and unchanged contents.

    References are weak, so that no tensor outlives the forward pass. An address counts only while
    its first tensor is alive and unchanged, as the allocator reuses it afterwards. Tensors made in
    inference mode have no version counter; each gets a new number.

    The version counter misses changes through ``.data`` or shared memory. They are found in the
    batches 1, 2, 4, 8 and so on, where entries are compared, too, which waits for the device.
    """

    def __init__(self) -> None:
        self._seen: dict[Key, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._count = 0
        self._batch = 0

    def id_of(self, tensor: torch.Tensor) -> int:
        """Return the number of a tensor."""
        if tensor.is_inference():
            return self._next()
        key = tensor_key(tensor)
        sample = sample_bytes(tensor) if self._samples and not tensor.is_meta else None
        if (key, sample) in self._seen:
            reference, number = self._seen[key, sample]
            first = reference()
            if first is not None and tensor_key(first) == key:
                return number
        number = self._next()
        self._seen[key, sample] = (weakref.ref(tensor), number)
        return number

    def start_batch(self) -> None:
        """Forget the tensors of the batch before."""
        self._seen.clear()
        self._batch += 1

    @property
    def _samples(self) -> bool:
        """True in the batches 1, 2, 4, 8 and so on."""
        return self._batch.bit_count() == 1

    def _next(self) -> int:
        self._count += 1
        return self._count
