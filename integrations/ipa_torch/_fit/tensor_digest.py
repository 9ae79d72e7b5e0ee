"""Digest of a tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from ipa_torch._layers.row_samples import strided_sample

_ENTRIES = 4096


def tensor_digest(tensor: torch.Tensor, entries: int = _ENTRIES) -> str:
    """Return the digest of a tensor's dtype, shape and some evenly spaced entries.

    Examples
    --------
    >>> tensor_digest(torch.zeros(3)) == tensor_digest(torch.zeros(4))
    False
    """
    return hashlib.sha256(b"".join(tensor_parts(tensor, entries))).hexdigest()


def tensor_parts(tensor: torch.Tensor, entries: int = _ENTRIES) -> Iterator[bytes]:
    """Yield the bytes that the digest of a tensor covers."""
    tensor = tensor.detach()
    shape = "nested" if tensor.is_nested else tuple(tensor.shape)
    yield f"{tensor.dtype} {tensor.layout} {shape} ".encode()
    if tensor.is_nested:
        for part in tensor.unbind():
            yield from tensor_parts(part, entries)
    elif tensor.is_meta:
        return
    elif tensor.is_quantized:
        yield from tensor_parts(tensor.int_repr(), entries)
    elif tensor.layout == torch.strided:
        sample = strided_sample(tensor.reshape(-1), entries).resolve_neg().resolve_conj()
        yield sample.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    else:
        for part in _stored_tensors(tensor):
            yield from tensor_parts(part, entries)


def _stored_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the dense tensors of which a sparse one consists."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense()]
