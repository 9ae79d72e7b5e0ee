"""Interface of everything that takes the rows of a layer's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class PendingRows(Protocol):
    """Rows that a consumer was given and has not absorbed yet."""

    @property
    def finish(self) -> Callable[[], Any]:
        """Absorb the rows."""


class RowConsumer(Protocol):
    """Learner, size probe or row buffer: what a node of the tree of shared inputs holds.

    A consumer rebinds its state, so that ``copy.copy`` of it is a snapshot.
    """

    passes: int

    @property
    def samples(self) -> int:
        """Number of rows absorbed."""

    def begin_update(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> PendingRows:
        """Start to absorb rows (n, features) of weights (n,); `PendingRows.finish` completes it."""


@dataclass(frozen=True)
class Deferred:
    """Pending rows whose absorption is one call."""

    finish: Callable[[], Any]
