"""Row weights that exclude first tokens: attention sinks of many causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ipa_core.errors import ShapeError
from ipa_torch import attention_mask


def without_first_token(batch: Any) -> torch.Tensor:
    """Return 0 for padding and for the first token of each sequence, else 1.

    In many causal language models the first token is an attention sink, whose activations in some
    layers have most of the energy of a batch, so that P follows them. Pass the function as
    ``get_ipa_model(..., row_weights=without_first_token)``.

    Parameters
    ----------
    batch : mapping
        With ``attention_mask``, ``input_ids`` or ``inputs_embeds``, whose leading axes are
        (batch, positions), padded on either side. In packed rows a sequence begins where
        ``position_ids`` do not continue.

    Returns
    -------
    torch.Tensor of shape (batch, positions)

    Raises
    ------
    ShapeError
        If the batch has no such tensor, has positions of another shape, or is that of an
        encoder-decoder model.

    Notes
    -----
    Weights of two functions are combined by their product:
    ``lambda batch: causal_label_mask(batch) * without_first_token(batch)``.

    Examples
    --------
    >>> without_first_token({"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])})
    tensor([[0, 0, 1, 1],
            [0, 1, 0, 0]])
    """
    present = _present(batch)
    first = present & (present.cumsum(1) == 1)
    positions = batch.get("position_ids")
    # Not the three axes of multimodal rotary positions.
    if isinstance(positions, torch.Tensor) and positions.ndim == 2:
        fits = positions.shape in (present.shape, (1, present.shape[1]))
        if not fits or positions.device != present.device:
            raise ShapeError(
                f"expected position_ids of shape {tuple(present.shape)} on {present.device}, got "
                f"{tuple(positions.shape)} on {positions.device}; build batches with the collator "
                "of training"
            )
        first[:, 1:] |= positions[:, 1:] != positions[:, :-1] + 1
    return (present & ~first).long()


def _present(batch: Any) -> torch.Tensor:
    """Return True for tokens, False for padding, shape (batch, positions)."""
    mask = attention_mask(batch)
    if isinstance(mask, torch.Tensor):
        return mask != 0
    if isinstance(batch, Mapping) and mask is None:
        for name in ("input_ids", "inputs_embeds"):
            tokens = batch.get(name)
            if isinstance(tokens, torch.Tensor) and tokens.ndim >= 2:
                return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    raise ShapeError(
        "expected batches of a causal language model, with attention_mask, input_ids or "
        f"inputs_embeds of shape (batch, positions, ...), got {_contents(batch)}; "
        "pass another row_weights"
    )


def _contents(batch: Any) -> str:
    return ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
