"""Subset of the rows of an activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ipa_torch._layers import async_device
from ipa_torch._layers.gather_memory import GatherMemory


@dataclass(frozen=True)
class RowSubset:
    """Rows of an activation that count, with their weights.

    Parameters
    ----------
    positions : torch.Tensor or None
        Positions on the activation's device; None for all.
    weights : torch.Tensor or None
        On the host; None for ones.
    memory : GatherMemory or None
        Memory for rows that are gathered on the host; None for new memory each time.
    """

    positions: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    memory: GatherMemory | None = None

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows (n, features) of the subset."""
        if self.positions is None:
            return rows
        if self.memory is None or async_device.is_async_device(rows.device):
            return rows.index_select(0, self.positions)
        return self.memory.gather(rows, self.positions)
