"""Row weights from the labels of causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ipa_core.errors import ShapeError
from ipa_torch import attention_mask

_IGNORED = -100  # ignore_index of the losses in transformers


def causal_label_mask(batch: Any) -> torch.Tensor:
    """Return 1 for positions of a causal language model whose prediction enters the loss, else 0.

    Position t predicts the label of position t + 1, so its weight is 1 where that label is not
    -100. Padding, and prompts whose labels are masked, have weight 0. Pass the function as
    ``get_ipa_model(..., row_weights=causal_label_mask)``.

    Parameters
    ----------
    batch : mapping
        With integer ``labels`` of shape (batch, positions), and optionally ``attention_mask``.

    Returns
    -------
    torch.Tensor of shape (batch, positions)

    Raises
    ------
    ShapeError
        If the batch has no such labels, or a mask of another shape.

    Examples
    --------
    >>> causal_label_mask({"labels": torch.tensor([[-100, -100, 5, 2]])})
    tensor([[0, 1, 1, 0]])
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not (isinstance(labels, torch.Tensor) and labels.ndim == 2 and _are_tokens(labels)):
        raise ShapeError(
            "expected batches with integer labels of shape (batch, positions), got "
            f"{_described(labels)}; build batches with the collator of training"
        )
    weights = torch.zeros_like(labels)
    weights[:, :-1] = labels[:, 1:] != _IGNORED
    mask = attention_mask(batch)
    if not isinstance(mask, torch.Tensor):
        return weights
    if (mask.shape, mask.device) != (labels.shape, labels.device):
        raise ShapeError(
            "expected an attention_mask of the labels' shape and device, got "
            f"{_described(mask)} beside {_described(labels)}; build batches with the collator of "
            "training"
        )
    return weights * mask


def _are_tokens(labels: torch.Tensor) -> bool:
    dtype = labels.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _described(labels: Any) -> str:
    if not isinstance(labels, torch.Tensor):
        return "none" if labels is None else type(labels).__name__
    return f"{labels.dtype} of shape {tuple(labels.shape)} on {labels.device}"
