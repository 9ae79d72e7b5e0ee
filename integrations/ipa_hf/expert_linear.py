"""Linear layer of an expert, and the view of the rows routed to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ipa_hf.expert_routing import RowRouting
from ipa_torch.extension import LinearView, RowSubset, WeightedRows, view_of


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


@dataclass(frozen=True, kw_only=True)
class RoutedView(LinearView):
    """Rows along the last axis, weighted by the tokens that they were routed from."""

    layer: ExpertLinear

    def row_shape(self, activation: torch.Tensor) -> tuple[int, ...]:
        """Return the number of tokens, the shape of a mask."""
        return (self._routing.tokens,)

    def im2row(
        self, activation: torch.Tensor, subset: RowSubset, limit: int | None
    ) -> WeightedRows:
        """Return rows and weights, as for every `MatmulView`."""
        return super().im2row(activation, self._routing.select(subset, activation.device), limit)

    @property
    def _routing(self) -> RowRouting:
        assert self.layer.routing is not None  # _ExpertsCall sets it
        return self.layer.routing


@view_of.register(ExpertLinear)
def routed_view_of(layer: ExpertLinear) -> RoutedView:
    """Return the view of an expert's rows."""
    return RoutedView(layer=layer)
