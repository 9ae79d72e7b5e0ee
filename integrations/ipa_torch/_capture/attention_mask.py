"""Padding mask of a batch: the default weights of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ipa_torch._capture.row_weights import Weights


def attention_mask(batch: Any) -> Weights:
    """Return the padding mask of a batch: 0 for padding, else 1; None if it has none.

    Parameters
    ----------
    batch : mapping or other
        A mapping with a 2-D ``attention_mask`` of shape (batch, positions), as tokenizers make it.
        With a 2-D ``decoder_attention_mask``, both are returned, the decoder's second.

    Returns
    -------
    torch.Tensor, pair of torch.Tensor or None

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import attention_mask
    >>> attention_mask({"attention_mask": torch.tensor([[1, 1, 0]])})
    tensor([[1, 1, 0]])
    """
    if not isinstance(batch, Mapping):
        return None
    mask, decoder_mask = (
        _mask_or_none(batch.get(f"{part}attention_mask")) for part in ("", "decoder_")
    )
    return mask if decoder_mask is None else (mask, decoder_mask)


def _mask_or_none(mask: Any) -> torch.Tensor | None:
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
