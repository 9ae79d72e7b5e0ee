"""Rank and alpha common to all layers of an exported adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

LoraPair: TypeAlias = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class UniformSize:
    """Rank and alpha of all layers of the exported adapter."""

    rank: int
    alpha: int

    @classmethod
    def of(cls, layers: Iterable[LoraLayer], adapter_name: str) -> Self:
        """Return the largest rank, with the alpha that keeps the most common scaling."""
        sizes = [(layer.r[adapter_name], layer.scaling[adapter_name]) for layer in layers]
        rank = max(rank for rank, _ in sizes)
        most_common, _ = Counter(scaling for _, scaling in sizes).most_common(1)[0]
        # Some servers declare alpha as an integer.
        return cls(rank, max(1, round(most_common * rank)))

    def pad(self, a: torch.Tensor, b: torch.Tensor, scaling: float) -> LoraPair:
        """Return A (..., rank, features) and B (..., outputs, rank), padded to this size."""
        missing = self.rank - a.shape[-2]
        a, b = F.pad(a.detach(), (0, 0, 0, missing)), F.pad(b.detach(), (0, missing))
        ratio = scaling * self.rank / self.alpha
        return a.contiguous(), (b if ratio == 1 else ratio * b).contiguous()

    def zeros(self, features: int, outputs: int, *leading: int) -> LoraPair:
        """Return A and B of zeros."""
        a, b = (self.rank, features), (outputs, self.rank)
        return torch.zeros(*leading, *a), torch.zeros(*leading, *b)
