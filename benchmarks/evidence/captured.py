"""Rows of A from what enters the adapted layers, and from the gradients of what leaves them.

All that is captured is kept at once: a few thousand rows for each layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.evidence.projections import Sample, damped_inverse, joined, leading

#: A row counts at most as one of this multiple of the median energy.
CAP = 4.0
#: Directions that a subspace iteration keeps beside those that are wanted.
SPARE = 24


@dataclass(frozen=True)
class Captured:
    """Inputs of one layer over the batches, and gradients of its outputs.

    Parameters
    ----------
    x : torch.Tensor
        Inputs, shape (rows, features), float64.
    g : torch.Tensor, optional
        Gradients of the outputs, shape (rows, outputs).
    first : torch.Tensor
        Which rows are of a first token, shape (rows,).
    """

    x: torch.Tensor
    g: torch.Tensor | None
    first: torch.Tensor


#: Weights of the rows of a layer, shape (rows,).
Weighting = Callable[[Captured], torch.Tensor]
#: Rows of A, shape (rank, features), in any scale, and the weights of the rows they are of.
Rule = Callable[[Captured, int], tuple[torch.Tensor, torch.Tensor]]


def every(rows: Captured) -> torch.Tensor:
    """Return ones."""
    return torch.ones_like(rows.x[:, 0])


def without_first(rows: Captured) -> torch.Tensor:
    """Return zero for first tokens: attention sinks in many models."""
    return (~rows.first).to(rows.x.dtype)


def unit(rows: Captured) -> torch.Tensor:
    """Return weights with which all rows have one length."""
    return 1 / rows.x.square().sum(1).clamp_min(1e-12)


def capped(rows: Captured) -> torch.Tensor:
    """Return weights with which no row has more than `CAP` times the median energy."""
    energies = rows.x.square().sum(1).clamp_min(1e-12)
    return (CAP * energies.median() / energies).clamp_max(1)


def moment(rows: Captured, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted second moment of the inputs, shape (features, features)."""
    return rows.x.T @ (weights[:, None] * rows.x) / weights.sum()


def inputs(
    rows: Captured, rank: int, *, weighting: Weighting = every, power: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return leading directions of the inputs, row k times its energy to the power -`power` / 2."""
    weights = weighting(rows)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weighted = weights.sqrt()[:, None] * rows.x
        _, values, vectors = torch.svd_lowrank(weighted, q=rank + SPARE, niter=8)
    sizes = (values[:rank] / values[0]).clamp_min(1e-6) ** -power
    return sizes[:, None] * vectors.T[:rank], weights


def damped(
    rows: Captured, rank: int, *, weighting: Weighting = every, share: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row space of the damped gradient; of the inputs' directions for the rest."""
    weights = weighting(rows)
    c = moment(rows, weights)
    step = _gradient(rows, weights) @ damped_inverse(c)
    common = torch.linalg.eigh(c).eigenvectors.flip(1).T[: rank - round(share * rank)]
    return joined(common, leading(step, rank), rank), weights


def mixed(
    rows: Captured, rank: int, *, beta: float, weighting: Weighting = without_first
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return leading eigenvectors of D^T D - beta c (C + cI)^-1, by gradient and inputs.

    D is the damped gradient G (C + cI)^-1 over its largest singular value, c the mean eigenvalue of
    C. Beta 0 gives the damped gradient, a large beta the leading directions of the inputs.
    """
    weights = weighting(rows)
    c = moment(rows, weights)
    inverse = damped_inverse(c)
    d = _gradient(rows, weights) @ inverse
    d = d / torch.linalg.matrix_norm(d, 2)
    criterion = d.T @ d - beta * c.trace() / len(c) * inverse
    return torch.linalg.eigh(criterion).eigenvectors.flip(1).T[:rank], weights


def standardized(
    rows: Captured, rank: int, *, weighting: Weighting = without_first, divided: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return leading directions of inputs whose coordinates have been brought to one energy.

    If `divided`, A divides the coordinates, too; else it takes them as they are.
    """
    weights = weighting(rows)
    c = moment(rows, weights)
    sizes = c.diag().clamp_min(1e-12 * c.trace()).sqrt()
    vectors = torch.linalg.eigh(c / sizes / sizes[:, None]).eigenvectors.flip(1).T[:rank]
    return vectors / sizes if divided else vectors, weights


def column_gradient(
    rows: Captured, rank: int, *, weighting: Weighting = every
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row space of the gradient with its columns brought to one size, as Adam does."""
    weights = weighting(rows)
    g = _gradient(rows, weights)
    return leading(g / g.abs().mean(0).clamp_min(1e-30), rank), weights


def fisher(
    rows: Captured, rank: int, *, weighting: Weighting = without_first, sized: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows along which one damped natural-gradient step gains most.

    With S and C the second moments of output gradients and inputs, the step is S^-1 G C^-1, and a
    step through A = V^T C^-1/2 gains the squares of the singular values belonging to V, the right
    singular vectors of S^-1/2 G C^-1/2. Row k times its singular value to the power `sized`: with
    1 the optimal columns of B are about equally long.
    """
    weights = weighting(rows)
    half_c = _root(moment(rows, weights))
    outputs = Captured(_outputs(rows), None, rows.first)
    half_s = _root(moment(outputs, weights))
    values, vectors = torch.linalg.svd(half_s @ _gradient(rows, weights) @ half_c)[1:]
    sizes = (values[:rank] / values[0]) ** sized
    return sizes[:, None] * (vectors[:rank] @ half_c), weights


def scaled(a: torch.Tensor, rows: Captured, weights: torch.Tensor) -> torch.Tensor:
    """Return rows with which A x has the energy that LoRA's random A would give it."""
    rank, features = a.shape
    total = weights @ rows.x.square().sum(1)
    kept = weights @ (rows.x @ a.T).square().sum(1)
    return a * (rank / (3 * features) * total / kept).sqrt()


def capture(sample: Sample, *, gradients: bool) -> Mapping[str, Captured]:
    """Return what each layer is given over the batches of a sample, padding left out."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in sample.layers}
    back: dict[str, list[torch.Tensor]] = {name: [] for name in sample.layers}
    firsts = []

    def forward(
        name: str, mask: torch.Tensor, layer: nn.Module, args: Any, output: torch.Tensor
    ) -> None:
        seen[name].append(args[0].detach()[mask].double())
        if gradients:
            output.register_hook(lambda g: back[name].append(g.detach()[mask].double()))

    for batch in sample.batches:
        mask = batch["attention_mask"].bool()
        place = torch.arange(mask.shape[1], device=mask.device)
        firsts.append((place == 0).expand_as(mask)[mask])
        hooks = [
            layer.register_forward_hook(partial(forward, name, mask))
            for name, layer in sample.layers.items()
        ]
        inputs_embeds = batch["inputs_embeds"].clone().requires_grad_(gradients)
        try:
            with torch.set_grad_enabled(gradients):
                loss = sample.loss(sample.model, {**batch, "inputs_embeds": inputs_embeds})
            if gradients:
                loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
    first = torch.cat(firsts)
    return {
        name: Captured(torch.cat(x), torch.cat(back[name]) if gradients else None, first)
        for name, x in seen.items()
    }


def choose(
    sample: Sample, rule: Rule, *, gradients: bool, scaling: str | float = "energy"
) -> dict[str, torch.Tensor]:
    """Return A for each layer by a rule: in LoRA's energy, or times a number."""
    found = {}
    for name, rows in capture(sample, gradients=gradients).items():
        made, weights = rule(rows, sample.rank)
        sized = scaled(made, rows, weights) if scaling == "energy" else float(scaling) * made
        found[name] = sized.float()
    return found


def _outputs(rows: Captured) -> torch.Tensor:
    if rows.g is None:
        raise ValueError("expected gradients of the outputs, got none; capture them")
    return rows.g


def _gradient(rows: Captured, weights: torch.Tensor) -> torch.Tensor:
    return _outputs(rows).T @ (weights[:, None] * rows.x)


def _root(c: torch.Tensor) -> torch.Tensor:
    """Return (C + c I)^-1/2, c the mean eigenvalue of C."""
    values, vectors = torch.linalg.eigh(c)
    return (vectors * (values + values.mean()).clamp_min(1e-30) ** -0.5) @ vectors.T
