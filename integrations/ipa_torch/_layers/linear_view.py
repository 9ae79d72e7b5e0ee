"""View of a linear layer as a matrix product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ipa_torch._layers.row_subset import RowSubset
from ipa_torch._layers.row_view import WeightedRows


@dataclass(frozen=True)
class LinearView:
    """View of linear layers: rows along the last axis."""

    transposed: bool = False

    def row_shape(self, activation: torch.Tensor) -> tuple[int, ...]:
        """Return the shape over which an activation has rows."""
        return tuple(activation.shape[:-1])

    def im2row(
        self, activation: torch.Tensor, subset: RowSubset, limit: int | None
    ) -> WeightedRows:
        """Return rows and weights, as for every `MatmulView`."""
        return subset.take(activation.reshape(-1, activation.shape[-1])), subset.weights

    def rows_and_grads(
        self, activation: torch.Tensor, gradient: torch.Tensor, limit: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows and gradients, in one group."""
        rows, grads = (t.reshape(-1, 1, t.shape[-1]) for t in (activation, gradient))
        return rows, grads

    def project(self, activation: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        """Multiply each row by a matrix (rank, features)."""
        return F.linear(activation, projection)

    def expand(self, projected: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Multiply each projected row by a matrix (outputs, rank)."""
        return F.linear(projected, matrix)

    def delta_weight(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the matrix in the layout of the weight."""
        return matrix.T if self.transposed else matrix
