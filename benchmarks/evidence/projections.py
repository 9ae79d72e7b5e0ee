"""Ways to choose P for every adapted layer, from a few batches of the task.

Each takes a `Sample` and returns projectors by layer name. What it costs is counted in passes over
a batch: one forward, two forward and backward.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.evidence.cutting import Batch
from benchmarks.evidence.task import run
from ipa_core import (
    ExactCovariance,
    HebbianRule,
    IncrementalPCA,
    Projector,
    ReconstructionAutoencoder,
)
from ipa_torch import (
    DampedGradientSketch,
    GradientSketch,
    GradientWeightedInputs,
    LayerProjectors,
    fit_gradient_projectors,
    fit_projectors,
    select_layers,
)

#: Directions that `less_inputs` removes, as in the study before.
COMMON = 8

Matrices = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Sample:
    """Input of a choice of P: the model without adapters, and batches."""

    model: nn.Module
    batches: Sequence[Batch]
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    rank: int
    seed: int

    @property
    def layers(self) -> dict[str, nn.Module]:
        return dict(select_layers(self.model.body, target_names(self.model)))


@dataclass(frozen=True)
class Kind:
    """A way to choose P, and its passes over each batch."""

    choose: Callable[[Sample], LayerProjectors]
    passes: int


def target_names(model: nn.Module) -> list[str]:
    """Return the names, in the body, of the layers that are adapted: all, or `model.targets`."""
    wanted = getattr(model, "targets", None)
    return [
        name
        for name, layer in model.body.named_modules()
        if isinstance(layer, nn.Linear)
        and name != "lm_head"
        and (wanted is None or name.rpartition(".")[2] in wanted)
    ]


def inputs(
    sample: Sample, rank: int | Mapping[str, int] | None = None, **options: Any
) -> LayerProjectors:
    """Return the leading directions of the layers' inputs: IPA."""
    return fit_projectors(
        sample.model.body,
        sample.batches,
        sample.rank if rank is None else rank,
        targets=target_names(sample.model),
        forward=run,
        progress=False,
        **options,
    )


def orthonormal(sample: Sample) -> LayerProjectors:
    """Return random directions; their energies are those of isotropic inputs."""
    generator = torch.Generator().manual_seed(sample.seed)
    made = {}
    for name, layer in sample.layers.items():
        features = layer.in_features
        rows = torch.linalg.qr(torch.randn(features, sample.rank, generator=generator)).Q.T
        ones = torch.ones(sample.rank)
        made[name] = Projector(rows, torch.zeros(features), ones, float(features), 1)
    return LayerProjectors(made)


def gradient(sample: Sample, learner: Any = GradientSketch) -> LayerProjectors:
    """Return what `ipa_torch.fit_gradient_projectors` learns."""
    found = fit_gradient_projectors(
        sample.model,
        sample.batches,
        sample.rank,
        targets=[f"body.{name}" for name in target_names(sample.model)],
        learner=learner,
        loss=sample.loss,
    )
    return LayerProjectors({name.removeprefix("body."): p for name, p in found.items()})


def less_inputs(sample: Sample) -> LayerProjectors:
    """Return the gradient's row space with the leading directions of the inputs removed."""

    def choose(g: torch.Tensor, c: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        common = torch.linalg.eigh(c).eigenvectors[:, -COMMON:]
        return leading(g - (g @ common) @ common.T, sample.rank)

    return by_matrices(sample, choose)


def damped(sample: Sample) -> LayerProjectors:
    """Return the row space of G (C + c I)^-1, c the mean eigenvalue of the inputs' moment C.

    A step of damped least squares instead of a gradient step: directions in which inputs are large
    anyway count less, without a number of directions to choose.
    """

    def choose(g: torch.Tensor, c: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return leading(g @ damped_inverse(c), sample.rank)

    return by_matrices(sample, choose)


def natural(sample: Sample) -> LayerProjectors:
    """Return the row space of a damped natural-gradient step, S^-1 G C^-1.

    The Fisher information is taken as a Kronecker product of the second moments of the inputs and
    of the outputs' gradients, as LoRA-DA weighs a first step.
    """
    moments = second_moments(sample)
    found, of_outputs = gradients_and_moments(sample)
    steps = {
        name: damped_inverse(of_outputs[name]) @ g @ damped_inverse(moments[name])
        for name, g in found.items()
    }
    return LayerProjectors(
        {name: of_rows(leading(x, sample.rank), moments[name]) for name, x in steps.items()}
    )


def with_inputs(sample: Sample) -> LayerProjectors:
    """Return half of the rank in directions of the inputs, the rest by the damped gradient."""

    def choose(g: torch.Tensor, c: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        common = torch.linalg.eigh(c).eigenvectors.flip(1).T[: sample.rank // 2]
        return joined(common, leading(g @ damped_inverse(c), sample.rank), sample.rank)

    return by_matrices(sample, choose)


def spread(sample: Sample) -> LayerProjectors:
    """Return directions of the inputs with ranks spread so that they capture most in all."""
    layers = sample.layers
    wide = {name: min(4 * sample.rank, x.in_features - 1) for name, x in layers.items()}
    learned = inputs(sample, wide)
    return learned.allocate(sample.rank * len(learned.shared))


def outputs(sample: Sample) -> LayerProjectors:
    """Return the directions from which W x, instead of x, is best rebuilt: U^T W.

    U are the leading directions of the outputs W x.
    """

    def choose(g: torch.Tensor, c: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        u = torch.linalg.eigh(w @ c @ w.T).eigenvectors[:, -sample.rank :].flip(1)
        return torch.linalg.qr((u.T @ w).T).Q.T

    return by_matrices(sample, choose, with_gradient=False)


def short_update(sample: Sample, rate: float = 1e-4) -> LayerProjectors:
    """Return the row space of the change of full weights in one pass of Adam over the batches.

    It needs the optimizer's memory of full fine-tuning for a moment.
    """
    layers = sample.layers
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with _wanting_gradients(layers):
        optimizer = torch.optim.Adam([layer.weight for layer in layers.values()], lr=rate)
        for batch in sample.batches:
            optimizer.zero_grad()
            sample.loss(sample.model, batch).backward()
            optimizer.step()
    change = {name: layer.weight.detach() - before[name] for name, layer in layers.items()}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(before[name])
    moments = second_moments(sample)
    rows = {name: leading(change[name].double(), sample.rank) for name in layers}
    return LayerProjectors({name: of_rows(rows[name], moments[name]) for name in layers})


def by_matrices(
    sample: Sample,
    choose: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    with_gradient: bool = True,
) -> LayerProjectors:
    """Return projectors with rows chosen from a layer's gradient, second moment and weight."""
    moments = second_moments(sample)
    weights = {name: layer.weight.detach().double() for name, layer in sample.layers.items()}
    found = weight_gradients(sample) if with_gradient else weights
    return LayerProjectors(
        {
            name: of_rows(choose(found[name], moments[name], weights[name]), moments[name])
            for name in weights
        }
    )


def second_moments(sample: Sample) -> Matrices:
    """Return E[x x^T] of the inputs of each layer, in float64."""
    features = {name: layer.in_features for name, layer in sample.layers.items()}
    projectors = fit_projectors(
        sample.model.body,
        sample.batches,
        features,
        targets=list(features),
        learner=ExactCovariance,
        forward=run,
        progress=False,
    )
    known: dict[int, torch.Tensor] = {}
    for p in projectors.values():
        if id(p) not in known:
            rows = p.components.double()
            known[id(p)] = rows.T @ (p.energies.double()[:, None] * rows)
    return {name: known[id(p)] for name, p in projectors.items()}


def weight_gradients(sample: Sample) -> Matrices:
    """Return the gradient of each layer's weight, summed over the batches, in float64."""
    layers = sample.layers
    with _wanting_gradients(layers):
        for batch in sample.batches:
            sample.loss(sample.model, batch).backward()
        found = {name: layer.weight.grad.double() for name, layer in layers.items()}
        sample.model.zero_grad()
    return found


def gradients_and_moments(sample: Sample) -> tuple[Matrices, Matrices]:
    """Return `weight_gradients`, and the summed second moment of the outputs' gradients."""
    layers = sample.layers
    moments = {}

    def hear(name: str, layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        def add(g: torch.Tensor) -> None:
            rows = g.detach().reshape(-1, g.shape[-1]).double()
            moments[name] = moments.get(name, 0) + rows.T @ rows

        output.register_hook(add)

    handles = [x.register_forward_hook(partial(hear, name)) for name, x in layers.items()]
    try:
        return weight_gradients(sample), moments
    finally:
        for handle in handles:
            handle.remove()


def leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the leading right singular vectors as rows."""
    return torch.linalg.svd(matrix, full_matrices=False).Vh[:rank]


def joined(first: torch.Tensor, second: torch.Tensor, rank: int) -> torch.Tensor:
    """Return orthonormal rows: those of the first, filled up with what the second adds to them."""
    return torch.linalg.qr(torch.cat([first, second]).T).Q.T[:rank]


def damped_inverse(moment: torch.Tensor) -> torch.Tensor:
    """Return (C + c I)^-1, c the mean eigenvalue of C."""
    unit = torch.eye(len(moment), dtype=moment.dtype) * moment.trace() / len(moment)
    return torch.linalg.inv(moment + unit)


def of_rows(rows: torch.Tensor, moment: torch.Tensor) -> Projector:
    """Return the projector of orthonormal rows, with the energies that inputs have along them."""
    energies = ((rows @ moment) * rows).sum(1)
    zeros = torch.zeros(rows.shape[1])
    return Projector(rows.float(), zeros, energies.float(), float(moment.trace()), 1)


@contextmanager
def _wanting_gradients(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let the weights of the layers want gradients, nothing else but a head does."""
    try:
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        yield
    finally:
        for layer in layers.values():
            layer.weight.requires_grad_(False)
            layer.weight.grad = None


KINDS: dict[str, Kind] = {
    "inputs": Kind(inputs, 1),
    "inputs, spread ranks": Kind(spread, 1),
    "inputs, centered": Kind(partial(inputs, learner=partial(ExactCovariance, center=True)), 1),
    "inputs, padding counted": Kind(partial(inputs, row_weights=None), 1),
    "inputs, IncrementalPCA": Kind(partial(inputs, learner=IncrementalPCA), 1),
    "inputs, HebbianRule": Kind(partial(inputs, learner=HebbianRule), 1),
    "inputs, autoencoder": Kind(partial(inputs, learner=ReconstructionAutoencoder), 1),
    "orthonormal": Kind(orthonormal, 0),
    "gradient": Kind(gradient, 2),
    "inputs by gradient norm": Kind(partial(gradient, learner=GradientWeightedInputs), 2),
    "gradient less inputs": Kind(less_inputs, 2),
    "damped gradient": Kind(damped, 2),
    "damped gradient, 32 directions": Kind(partial(gradient, learner=DampedGradientSketch), 2),
    "natural gradient": Kind(natural, 2),
    "half inputs": Kind(with_inputs, 2),
    "half inputs, 32 directions": Kind(
        partial(gradient, learner=partial(DampedGradientSketch, input_share=0.5)), 2
    ),
    "outputs": Kind(outputs, 1),
    "short update": Kind(short_update, 2),
}
