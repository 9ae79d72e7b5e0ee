"""Rows of the activations in a batch, with their weights."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from ipa_torch._capture.hooks import Hook
from ipa_torch._capture.row_weights import RowWeighter, RowWeights
from ipa_torch._capture.tensor_ids import TensorIds
from ipa_torch._layers.row_view import RowView, WeightedRows
from ipa_torch._settings import resolve_max_patches


class ActivationRows:
    """Rows of the activations of a batch, with weights, and keys of equal rows."""

    def __init__(
        self, model: nn.Module, row_weights: RowWeights | None, max_patches: int | None
    ) -> None:
        self._weighter = RowWeighter(model, row_weights)
        self._max_patches = resolve_max_patches(max_patches)
        self._tensor_ids = TensorIds()

    @property
    def hooks(self) -> list[Hook]:
        """Hooks that the weights need during a batch."""
        return self._weighter.hooks

    def start(self, batch: Any) -> int | None:
        """Start a batch; return its number of rows of nonzero weight, or None without weights."""
        self._tensor_ids.start_batch()
        return self._weighter.start(batch)

    def key_of(self, activation: torch.Tensor, view: RowView) -> Hashable:
        """Return a key of the rows of a view; the same unchanged tensor has the same key."""
        return self._tensor_ids.id_of(activation), view

    def end_batch(self) -> None:
        """Warn about layers to whose inputs the weights do not apply."""
        self._weighter.end_batch()

    def close(self) -> None:
        """End the reading, with a warning if the weights may have been taken transposed."""
        self._weighter.close()

    def read(self, name: str, activation: torch.Tensor, view: RowView) -> WeightedRows:
        """Return the rows (n, features) of nonzero weight, and their weights, None for ones."""
        subset = self._weighter(name, activation, view.row_shape(activation))
        return view.im2row(activation.detach(), subset, self._max_patches)
