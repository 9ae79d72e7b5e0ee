"""Samples of rows: stratified random, and evenly spaced."""

from __future__ import annotations

import torch


def stratified_indices(count: int, limit: int | None) -> torch.Tensor | None:
    """Return ``limit`` random indices below ``count``, from as many equal strata.

    Each index has the same expected count, so that means over the sample are unbiased; an index at
    the boundary of two strata may be drawn twice. None: all indices are within the limit.
    """
    if limit is None or count <= limit:
        return None
    drawn = torch.arange(limit, dtype=torch.float64, device="cpu")
    drawn += torch.rand(limit, dtype=torch.float64, device="cpu")
    return (drawn * (count / limit)).long().clamp(max=count - 1)


def strided_sample(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return evenly spaced rows, as a view: at least ``count`` and fewer than twice as many.

    Examples
    --------
    >>> strided_sample(torch.arange(10), 4)
    tensor([0, 2, 4, 6, 8])
    """
    return rows[:: max(1, len(rows) // count)]
