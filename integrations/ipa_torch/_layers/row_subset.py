"""Subset of the rows of an activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch


class GatherMemory:
    """Memory on the host that the rows of one layer after another are gathered into.

    New memory costs a page fault for every few kilobytes, which takes longer than the copy.
    """

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, torch.Tensor] = {}

    def gather(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the rows at some positions; the next call overwrites them.

        Examples
        --------
        >>> GatherMemory().gather(torch.eye(3), torch.tensor([2]))
        tensor([[0., 0., 1.]])
        """
        shape = positions.shape[0], rows.shape[1]
        size = shape[0] * shape[1]
        memory = self._memory.get(rows.dtype)
        if memory is None or memory.numel() < size:
            memory = self._memory[rows.dtype] = rows.new_empty(size)
        return torch.index_select(rows, 0, positions, out=memory[:size].view(shape))


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
        if self.memory is None or rows.device.type != "cpu":
            return rows.index_select(0, self.positions)
        return self.memory.gather(rows, self.positions)
