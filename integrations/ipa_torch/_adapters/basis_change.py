"""Change of basis of a trained B when P changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import nn

from ipa_core import Projector
from ipa_torch._adapters.shared_projection import SharedProjection
from ipa_torch._float64 import in_float64

Writes: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]


def change_basis(
    projection: SharedProjection,
    lora_B: Mapping[str, nn.Parameter],
    projector: Projector,
    scale: float,
    optimizer: torch.optim.Optimizer | None,
) -> tuple[Writes, dict[str, float]]:
    """Return the values for a new P, for B and its first moment in the new basis, and lost shares.

    The lost share of a layer is the part of B P_old outside the new span, in Frobenius norm.
    """
    old = in_float64(projection.weight.detach())
    new = procrustes_align(old, in_float64(projector.components).to(old.device))
    transition = old @ new.T
    ratio = float(projection.scale) / scale
    lost_share: dict[str, float] = {}
    writes: Writes = []
    with torch.no_grad():
        for name, parameter in lora_B.items():
            before = in_float64(parameter)
            after = before @ transition
            lost_share[name] = _share_outside_span(before, after)
            writes.append((parameter, (ratio * after).to(parameter.dtype)))
            states = {} if optimizer is None else optimizer.state
            moment = states.get(parameter, {}).get("exp_avg")
            if moment is not None:
                # Gradients rotate as their parameter does, and scale inversely.
                rotated = in_float64(moment) @ transition / ratio
                writes.append((moment, rotated.to(moment.dtype)))
    writes.append((projection.weight, new.to(projection.weight.dtype)))
    writes.append((projection.scale, torch.full_like(projection.scale, scale)))
    return writes, lost_share


def procrustes_align(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return the basis of the row space of ``new`` that is nearest to ``old`` (Procrustes).

    Examples
    --------
    >>> old, new = torch.eye(2, 3), torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    >>> torch.allclose(procrustes_align(old, new), old)
    True
    """
    left, _, right = torch.linalg.svd(old @ new.T)
    aligned: torch.Tensor = (left @ right) @ new
    return aligned


def _share_outside_span(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the share of B P_old outside the new span, from B and B P_old P_new^T."""
    energy = float(before.square().sum())
    if energy == 0:
        return 0.0
    return math.sqrt(max(0.0, 1 - float(after.square().sum()) / energy))
