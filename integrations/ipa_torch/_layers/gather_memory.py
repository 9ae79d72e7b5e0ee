"""Memory on the host that rows are gathered into."""

from __future__ import annotations

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
