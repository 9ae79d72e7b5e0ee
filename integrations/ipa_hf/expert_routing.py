"""Routing of tokens to experts: rows of an activation, and their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ipa_hf.expert_linear import ExpertLinear
from ipa_torch.extension import LinearView, RowSelection, RowSubset, WeightedRows, view_of


@dataclass(frozen=True)
class RowRouting:
    """Tokens and weights of the rows of an activation.

    Parameters
    ----------
    tokens : int
        Number of tokens, padding included.
    token : torch.Tensor or None
        Token index of each row, of shape (rows,); None if row i is token i.
    weight : torch.Tensor or None
        Factor of each row's weight, of shape (rows,), multiplied with its token's; None for ones.
    """

    tokens: int
    token: torch.Tensor | None
    weight: torch.Tensor | None

    def select(self, subset: RowSubset, device: torch.device) -> RowSubset:
        """Return the rows of a subset of the tokens, and their weights."""
        places, token_weight = subset.positions, subset.weights
        weight = self.weight
        if places is not None or token_weight is not None:
            by_token = torch.zeros(self.tokens, device=device)
            positive = 1.0 if token_weight is None else token_weight.to(by_token)
            by_token[slice(None) if places is None else places] = positive
            by_row = by_token if self.token is None else by_token[self.token]
            weight = by_row if weight is None else by_row * weight
        return RowSubset() if weight is None else RowSelection(weight).on(device)


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
