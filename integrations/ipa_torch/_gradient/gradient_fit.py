"""Fit of projectors to the gradients of the layers' weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from ipa_core import Learner
from ipa_core.errors import ArrayTypeError, EmptyStreamError, SettingError, ShapeError
from ipa_core.learners.factory import make_learner_of
from ipa_core.settings import check_callable, check_instance
from ipa_torch._capture.autocast import no_grad_or_autocast
from ipa_torch._capture.batch_device import device_of, on_device
from ipa_torch._capture.eval_mode import eval_mode
from ipa_torch._capture.forward import check_batches
from ipa_torch._capture.hooks import Hook, HookSet
from ipa_torch._distributed.process_group import FitProcessGroup, ProcessGroupArg
from ipa_torch._gradient.gradient_learner import GradientLearner
from ipa_torch._gradient.gradient_sketch import GradientSketch
from ipa_torch._layer_rank import resolve_rank
from ipa_torch._layers.activation_tensor import check_tensors, input_of, output_of
from ipa_torch._layers.adapter_support import check_supported
from ipa_torch._layers.execution_device import check_loaded
from ipa_torch._layers.matmul_view import view_of
from ipa_torch._layers.targets import ALL_LINEAR, Targets, select_layers
from ipa_torch._layers.unwrap import unwrap_model
from ipa_torch._settings import resolve_max_patches
from ipa_torch.errors import LayerError, named_layer
from ipa_torch.layer_projectors import LayerProjectors

Loss: TypeAlias = Callable[[nn.Module, Any], torch.Tensor]


def fit_gradient_projectors(
    model: nn.Module,
    batches: Iterable[Any],
    rank: int | Mapping[str, int],
    *,
    targets: Targets = ALL_LINEAR,
    learner: Callable[[int], GradientLearner] = GradientSketch,
    loss: Loss | None = None,
    max_patches: int | None = 8192,
    process_group: ProcessGroupArg = "world",
) -> LayerProjectors:
    r"""Learn a projection of each layer's inputs from the gradient of its weight.

    A few batches are enough (8 of 32 in the study at hand). Train the head for a moment before:
    with an untrained head most of the gain is gone. The evidence is from small models; see
    docs/evidence.md.

    No parameter's gradient is computed and no parameter changes. Layers do not share projectors,
    as their gradients differ.

    Parameters
    ----------
    model, batches, rank, targets, max_patches, process_group
        As for `fit_projectors`.
    learner : callable, default `GradientSketch`
        Makes a learner of inputs and gradients from a rank. `GradientSketch`: the leading row
        space of the weight's gradient :math:`G = \sum_i g_i x_i^\top`. `DampedGradientSketch`:
        that of :math:`G (C + cI)^{-1}`, C the second moment of the inputs.
        ``functools.partial(DampedGradientSketch, input_share=0.5)``: half of the rows are leading
        directions of the inputs. `GradientWeightedInputs`: leading directions of the inputs, each
        row weighted by :math:`|g_i|`.
    loss : callable, optional
        ``loss(model, batch)`` returns a scalar. By default the model is called with the batch's
        keywords and its output has a ``loss``, as in transformers.

    Returns
    -------
    LayerProjectors

    Raises
    ------
    LayerError
        If no layer gets a gradient, or a target cannot have an adapter. Single layers without a
        gradient are in `LayerProjectors.missing`.
    EmptyStreamError
        If there is no batch.
    PeerError
        If another rank failed; the message has its error.
    RankError, NonFiniteError, ArrayTypeError, ShapeError
        If a layer's rows are invalid; the message names the layer.

    Notes
    -----
    Cost: a forward and a backward pass for each batch, and O((2r + 8) n (features + outputs)), and
    where inputs are learned that of the learner.

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
    model = unwrap_model(model)
    layers = select_layers(model, targets)
    check_batches(batches)
    check_loaded(layers)
    for name, layer in layers.items():
        check_supported(name, layer)
    max_patches = resolve_max_patches(max_patches)
    if loss is not None:
        check_callable("loss", loss, cure="pass a function of model and batch, or None")
    learners = {name: _make_learner(learner, resolve_rank(name, rank)) for name in layers}
    hooks = HookSet(
        Hook(name, module, partial(_forward_hook, name, learners[name], max_patches), after=True)
        for name, module in layers.items()
    )
    with FitProcessGroup(process_group) as fit_group:
        fit_group.begin(model)
        with eval_mode(model), _no_parameter_gradients(model), torch.enable_grad(), hooks:
            seen = _run_backward(model, fit_group.lockstep(iter(batches)), loss)
        if not seen and fit_group.group is None:
            raise EmptyStreamError("expected at least one batch, got none")
        projectors = fit_group.merge(learners, seen)
    learned = {
        name: projector.to(torch, device=device_of(layers[name]))
        for name, projector in projectors.items()
        if projector is not None
    }
    if not learned:
        raise LayerError(
            "expected a gradient for at least one layer, got none; let the loss depend on them"
        )
    missing = {name: "no gradient reached its output" for name in layers if name not in learned}
    return LayerProjectors(learned, missing=missing)


def _run_backward(model: nn.Module, batches: Iterable[Any], loss: Loss | None) -> int:
    """Run a forward and a backward pass for each batch; return how many there were."""
    seen = 0
    for batch in batches:
        batch = on_device(batch, device_of(model))
        value = _checked((_model_loss if loss is None else loss)(model, batch))
        if value.requires_grad:
            value.backward()
        seen += 1
    return seen


def _make_learner(factory: Callable[[int], GradientLearner], rank: int) -> GradientLearner:
    cure = "pass GradientSketch, DampedGradientSketch or GradientWeightedInputs"
    learner = make_learner_of(GradientLearner, factory, rank, cure)
    if isinstance(learner, Learner):
        raise SettingError(
            f"expected a learner of inputs and gradients, got {type(learner).__name__}; pass "
            "functools.partial(GradientWeightedInputs, learner=...)"
        )
    return learner


def _checked(loss: torch.Tensor) -> torch.Tensor:
    """Return a loss after a check that it is a scalar."""
    check_instance("the loss", loss, torch.Tensor, "a tensor", cure="return it from the function")
    if loss.numel() != 1:
        raise ShapeError(f"expected a scalar loss, got shape {tuple(loss.shape)}; take its mean")
    return loss


def _model_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    value = getattr(model(**batch), "loss", None) if isinstance(batch, Mapping) else None
    if not isinstance(value, torch.Tensor):
        raise LayerError(
            "expected an output with a loss for a mapping batch (with labels), got none; "
            "pass loss=..."
        )
    return value


@contextmanager
def _no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _forward_hook(
    name: str,
    learner: GradientLearner,
    limit: int | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: torch.Tensor,
) -> torch.Tensor:
    """Update the learner of a layer once the gradient of its output is there."""
    with named_layer(name):
        x = input_of(module, args, kwargs).detach()
        check_tensors(module, x)
        if not isinstance(output, torch.Tensor):
            raise ArrayTypeError(
                f"expected a tensor as the output of {type(module).__name__}, got a "
                f"{type(output).__name__}; leave the layer out of the targets"
            )
        check_tensors(module, output_of(module, output))
    if not output.requires_grad:
        # No input of this layer requires a gradient: the graph starts here, with a copy, as a leaf
        # may not be changed in place (by a ReLU, say).
        output = output.requires_grad_(True).clone()

    def update(g: torch.Tensor) -> None:
        with named_layer(name), no_grad_or_autocast(x.device):
            learner.update(*view_of(module).rows_and_grads(x, g, limit))

    output.register_hook(update)
    return output
