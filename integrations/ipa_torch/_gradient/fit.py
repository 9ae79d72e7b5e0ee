"""Projections chosen by the gradient of the layers' weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from ipa_core import Learner, RandomizedSVD
from ipa_core.errors import EmptyStreamError, IPAError, with_context
from ipa_torch._capture.eval_mode import eval_mode, no_autocast
from ipa_torch._capture.forward import device_of, on_device
from ipa_torch._distributed.process_group import FitProcessGroup, ProcessGroupArg
from ipa_torch._gradient.damped_sketch import DampedGradientSketch
from ipa_torch._gradient.sketch import GradientLearner, GradientSketch, WeightedInputs
from ipa_torch._layers.matmul_view import input_of, view_of
from ipa_torch._layers.targets import ALL_LINEAR, Targets, select_layers
from ipa_torch._layers.unwrap import unwrap_model
from ipa_torch.errors import LayerError, check_choice
from ipa_torch.projectors import LayerProjectors, resolve_rank

Source: TypeAlias = Literal["gradient", "damped gradient", "mixed", "inputs"]
Loss: TypeAlias = Callable[[nn.Module, Any], torch.Tensor]


def fit_gradient_projectors(
    model: nn.Module,
    batches: Iterable[Any],
    rank: int | Mapping[str, int],
    *,
    targets: Targets = ALL_LINEAR,
    source: Source = "gradient",
    learner: Callable[[int], Learner] = RandomizedSVD,
    loss: Loss | None = None,
    max_patches: int | None = 8192,
    process_group: ProcessGroupArg = "world",
) -> LayerProjectors:
    r"""Learn projections by the loss; what is known of them was measured on small models.

    With ``source="gradient"`` P spans the leading row space of the weight's gradient
    :math:`G = \sum_i g_i x_i^\top`, by a sign sketch. With ``source="damped gradient"`` it is
    that of :math:`G (C + cI)^{-1}`, C the second moment of the inputs and c its mean eigenvalue:
    directions count less where inputs are large anyway. With ``source="mixed"`` half of the rows
    are the leading directions of the inputs, as in `fit_projectors`, the rest the damped
    gradient's. With ``source="inputs"`` P is learned from the inputs alone, each row weighted by
    :math:`|g_i|`. A few batches are enough (8 of 32 in the study at hand), and the head should have
    been trained for a moment: with an untrained one most of the gain is gone.

    No parameter's gradient is computed and no parameter changes. Layers do not share, as their
    gradients differ.

    Parameters
    ----------
    model, batches, rank, targets, learner, max_patches, process_group
        As for `fit_projectors`; the learner is that of the inputs, which ``source="gradient"``
        does not need.
    source : {"gradient", "damped gradient", "mixed", "inputs"}
    loss : callable, optional
        ``loss(model, batch)`` gives a scalar. By default the model is called with the batch's
        keywords and its output has a ``loss``, as in transformers.

    Returns
    -------
    Projectors

    Raises
    ------
    LayerError
        If no layer gets a gradient. Single layers without one are in `LayerProjectors.missing`.
    EmptyStreamError
        If there is no batch.
    PeerError
        If another process failed; the message says with what.
    RankError, NonFiniteError
        If a layer's rows are unfit; the message names it.

    Notes
    -----
    Cost: a forward and a backward pass for each batch, and O((2r + 8) n (features + outputs)), and
    where inputs are learned what the learner takes.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import fit_gradient_projectors
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> def loss(model, batch):
    ...     return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> batch = torch.randn(32, 8), torch.randint(0, 2, (32,))
    >>> list(fit_gradient_projectors(model, [batch], rank=2, loss=loss))
    ['0', '2']
    """
    check_choice("source", source, Source)
    model = unwrap_model(model)
    layers = select_layers(model, targets)
    learners: dict[str, GradientLearner] = {}
    for name in layers:
        own = resolve_rank(name, rank)
        learners[name] = _make_learner(source, own, learner)
    seen = 0
    with FitProcessGroup(process_group) as fit_group:
        fit_group.begin(model)
        with eval_mode(model), _no_parameter_gradients(model), torch.enable_grad():
            with _listening(layers, learners, max_patches):
                for batch in fit_group.lockstep(iter(batches)):
                    batch = on_device(batch, device_of(model))
                    value = (_own_loss if loss is None else loss)(model, batch)
                    if value.requires_grad:
                        value.backward()
                    seen += 1
        if not seen and fit_group.group is None:
            raise EmptyStreamError("expected at least one batch, got none")
        found = fit_group.merge({name: learner.learner for name, learner in learners.items()}, seen)
    learned = {
        name: projector.to(torch, device=device_of(layers[name]))
        for name, projector in found.items()
        if projector is not None
    }
    if not learned:
        raise LayerError(
            "expected a gradient for at least one layer, got none; let the loss depend on them"
        )
    missing = {name: "no gradient reached its output" for name in found if name not in learned}
    return LayerProjectors(learned, missing=missing)


def _make_learner(source: Source, rank: int, learner: Callable[[int], Learner]) -> GradientLearner:
    if source == "gradient":
        return GradientSketch(rank)
    if source in ("damped gradient", "mixed"):
        return DampedGradientSketch(rank, learner, held=rank // 2 if source == "mixed" else 0)
    return WeightedInputs(learner(rank))


def _own_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    value = getattr(model(**batch), "loss", None) if isinstance(batch, Mapping) else None
    if not isinstance(value, torch.Tensor):
        raise LayerError(
            "expected an output with a loss for a mapping batch (with labels), got none; "
            "pass loss=..."
        )
    return value


@contextmanager
def _no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _listening(
    layers: Mapping[str, nn.Module], learners: Mapping[str, GradientLearner], limit: int | None
) -> Iterator[None]:
    handles = []
    try:
        for name, module in layers.items():
            hook = partial(_forward_hook, name, learners[name], limit)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward_hook(
    name: str,
    learner: GradientLearner,
    limit: int | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: torch.Tensor,
) -> torch.Tensor:
    """Learn from a call once the gradient of its output has come."""
    if not output.requires_grad:
        # Nothing before this layer wants a gradient: the graph starts here, with a copy, as a leaf
        # may not be changed in place (by a ReLU, say).
        output = output.requires_grad_(True).clone()
    x = input_of(module, args, kwargs).detach()

    def arrived(g: torch.Tensor) -> None:
        try:
            with no_autocast(x.device):
                learner.update(*view_of(module).rows_and_grads(x, g, limit))
        except IPAError as error:
            raise with_context(error, f"layer {name!r}") from error

    output.register_hook(arrived)
    return output
