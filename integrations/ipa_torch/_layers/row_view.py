"""View of an activation as rows."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import torch

from ipa_torch._layers.row_subset import RowSubset

WeightedRows: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]


class RowView(Protocol):
    """View of an activation as rows. Equal views, by hash, of the same tensor give equal rows."""

    def row_shape(self, activation: torch.Tensor) -> tuple[int, ...]:
        """Return the shape (batch, *positions) over which an activation has rows."""

    def im2row(
        self, activation: torch.Tensor, subset: RowSubset, limit: int | None
    ) -> WeightedRows:
        """Return the rows (n, features) of a subset of positions, or of all, and their weights.

        At most ``limit`` patches are taken.
        """
