"""Recomputation of a frozen P early in training, with B expressed in the new basis."""

import copy
from dataclasses import dataclass, replace

import torch

from benchmarks.evidence.projections import (
    KINDS,
    Sample,
    joined,
    leading,
    of_rows,
    second_moments,
)
from ipa_hf.lora_layers import lora_A_and_B, lora_layers
from ipa_torch.extension import energy_scale


@dataclass(frozen=True)
class Refresh:
    """Settings of a recomputation of P.

    Parameters
    ----------
    projection : str
        How, of `KINDS`, for the model as it has become by then.
    after : int
        Training steps before it.
    kept : float
        Share of the rank kept for the directions of the old P that B has come to use most.
    """

    projection: str
    after: int = 20
    kept: float = 0.0


@dataclass(frozen=True)
class ScheduledRefresh:
    """A refresh in a training run; called with its optimizer."""

    refresh: Refresh
    sample: Sample

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        """Choose P for the model as it is; B A becomes what of it lies in the new span.

        The optimizer's moments of B start anew, as they belong to other coordinates.
        """
        adapted = self.sample.model
        merged = copy.deepcopy(adapted)
        merged.body = merged.body.merge_and_unload()
        sample = replace(self.sample, model=merged)
        with torch.enable_grad():
            found = KINDS[self.refresh.projection].choose(sample)
        moments = second_moments(sample)
        stay = round(self.refresh.kept * sample.rank)
        for name, layer in lora_layers(adapted.body, "default").items():
            a, b = lora_A_and_B(layer, "default")
            update = b.double() @ a.double()
            rows = joined(leading(update, stay), found[name].components.double(), sample.rank)
            scale = energy_scale(of_rows(rows, moments[name]))
            a.copy_(scale * rows)
            b.copy_(update @ rows.T / scale)
            optimizer.state.pop(b, None)
