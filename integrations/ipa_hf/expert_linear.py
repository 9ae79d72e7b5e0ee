"""Linear layer of an expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from ipa_hf.expert_routing import RowRouting


class ExpertLinear(nn.Module):
    """Product with the matrix of an expert; its hooks observe the rows routed to the expert.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the matrix. The matrix is an argument of `forward`, as the experts hold it.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.routing: RowRouting | None = None

    def forward(
        self, rows: torch.Tensor, matrix: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return products (n, outputs) of rows (n, features), or the rows if no matrix is given."""
        return rows if matrix is None else F.linear(rows, matrix, bias)
