"""Interface of the consumers of a layer's activation rows."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class PendingRows(Protocol):
    """Rows that a consumer has begun to absorb."""

    def finish(self) -> Any:
        """Absorb the rows."""


class RowConsumer(Protocol):
    """Learner, shape probe or row buffer. Autocast and gradients are the consumer's to disable.

    A consumer rebinds its state, so that ``copy.copy`` of it is a snapshot.
    """

    @property
    def passes(self) -> int:
        """Number of passes over the rows that the consumer asks for."""

    @property
    def samples(self) -> int:
        """Number of rows absorbed."""

    def begin_update(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> PendingRows:
        """Start to absorb rows (n, features) of weights (n,); `PendingRows.finish` completes it."""
