"""Rows of nonzero weight in a batch."""

from __future__ import annotations

import functools
import math

import torch

from ipa_torch._capture.batch_device import on_device
from ipa_torch._layers.gather_memory import GatherMemory
from ipa_torch._layers.row_subset import RowSubset


class RowSelection:
    """Rows of nonzero weight in a batch, computed once for all layers.

    The weights stay on the host, where a learner sums them: a device is not asked for them.
    """

    def __init__(self, weights: torch.Tensor, memory: GatherMemory | None = None) -> None:
        self.shape = tuple(weights.shape)
        self._dense = weights.detach().cpu()
        flat = self._dense.reshape(-1)
        present = flat != 0
        kept = int(present.sum())
        self.rows = kept
        self._index = None if kept == flat.numel() else present.nonzero()[:, 0]
        kept_weights = flat if self._index is None else flat.index_select(0, self._index)
        self._weights = None if bool((kept_weights == 1).all()) else kept_weights
        self._memory = memory
        self._moved: dict[torch.device, RowSubset] = {}

    @property
    def trivial(self) -> bool:
        """True if all rows count once."""
        return self._index is None and self._weights is None

    def fits(self, row_shape: tuple[int, ...]) -> bool:
        """Return whether an activation with these leading axes has the rows of the mask."""
        # Axes of length 1 do not change the order of the rows.
        return _longer_axes(row_shape) in (_longer_axes(self.shape), (math.prod(self.shape),))

    @functools.cached_property
    def symmetric(self) -> bool:
        """True if the weights are equal to their transpose."""
        return bool((self._dense == self._dense.T).all())

    def on(self, device: torch.device) -> RowSubset:
        """Return the rows of nonzero weight in an activation on a device, and their weights."""
        if device not in self._moved:
            index = on_device(self._index, device)
            self._moved[device] = RowSubset(index, self._weights, self._memory)
        return self._moved[device]


def _longer_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)
