"""Interface of the consumers of a layer's activation rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class PendingRows(Protocol):
    """Rows that a consumer has begun to absorb."""

    @property
    def finish(self) -> Callable[[], Any]:
        """Absorb the rows."""


class RowConsumer(Protocol):
    """Learner, shape probe or row buffer, at a node of the tree of shared inputs.

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
    """Pending rows that a call absorbs."""

    finish: Callable[[], Any]
