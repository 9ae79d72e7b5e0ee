"""Linear layer of an expert."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ipa_hf.expert_routing import RoutedView, RowRouting
from ipa_torch.extension import view_of


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


@view_of.register(ExpertLinear)
def routed_view_of(layer: ExpertLinear) -> RoutedView:
    """Return the view of an expert's rows."""
    return RoutedView(layer=layer)
