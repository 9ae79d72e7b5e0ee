"""Routing of tokens to experts: rows of an activation, and their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ipa_torch.extension import RowSelection, RowSubset


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
