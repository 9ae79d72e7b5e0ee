"""Check on a probe input that an adapter may be added to a layer, and merged into its weight."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ipa_core.errors import ShapeError, with_context
from ipa_torch._layers.execution_device import execution_device
from ipa_torch._layers.layer_properties import features_of, is_stock, outputs_of
from ipa_torch._layers.matmul_view import ConvView, LinearView, MatmulView, view_of
from ipa_torch.errors import LayerError

#: Share of the change of the output by which adding and merging may differ.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 5e-2


def check_supported(name: str, layer: nn.Module) -> None:
    """Check that an adapter may be added to the output of a layer.

    Raises
    ------
    LayerError
        If the layer is no matrix product, or returns something else than one row of outputs for
        each row of its input.
    """
    try:
        view = view_of(layer)
        outputs = outputs_of(layer)
        features_of(layer)
        _check_output(layer, view, outputs)
    except LayerError as error:
        raise with_context(error, f"layer {name!r}") from error


def merge_obstacle(layer: nn.Module) -> str | None:
    """Return the reason for which no adapter can be merged into a layer's weight, None if it can.

    A layer that is not of torch's classes is run on a probe input, in evaluation mode and on a
    shallow copy, once with the term of an adapter added and once with it merged.

    Examples
    --------
    >>> class Halved(nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x) / 2
    >>> merge_obstacle(nn.Linear(4, 2)) is None, merge_obstacle(Halved(4, 2)) is None
    (True, False)
    """
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return f"expected a floating weight to merge into, got a {type(layer).__name__}"
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        kind = type(weight.data) if type(weight) is nn.Parameter else type(weight)
        return f"expected a weight that is a plain tensor, got a {kind.__name__}"
    if weight.is_meta:
        return "expected a weight that is loaded, got one on the meta device"
    if is_stock(layer):
        return None
    return _difference(layer, view_of(layer), weight)


@torch.no_grad()
def _difference(layer: nn.Module, view: MatmulView, weight: nn.Parameter) -> str | None:
    """Return a reason if merging and adding a random adapter term differ on a probe."""
    kind = type(layer).__name__
    generator = torch.Generator().manual_seed(0)
    features, outputs = features_of(layer), outputs_of(layer)
    size = float(weight.float().square().mean().sqrt()) or 1.0
    lora_A = torch.randn(2, features, generator=generator, device="cpu").to(weight)
    lora_B = (size * torch.randn(outputs, 2, generator=generator, device="cpu")).to(weight)
    merged = weight + view.delta_weight(lora_B @ lora_A, weight)
    for x in _probes(view, layer, generator, weight):
        try:
            before, after = _output(layer, x, weight), _output(layer, x, merged)
            change = view.expand(view.project(x, lora_A), lora_B)
            errors, changes = (
                t.float().flatten(1).norm(dim=1) for t in (after - before - change, change)
            )
            error = (errors / changes).max()
        except Exception:  # the layer's: it may want inputs of another shape
            continue
        tolerance = _HALF_TOLERANCE if weight.dtype.itemsize < 4 else _TOLERANCE
        if error <= tolerance:
            return None
        return f"expected a layer that computes W x + b, got a {kind} that computes something else"
    return f"expected a layer that can be run on a probe input, got a {kind} that cannot"


@torch.no_grad()
def _check_output(layer: nn.Module, view: MatmulView, outputs: int) -> None:
    """Check the type and shape of the output, if the layer can be run on a probe."""
    if is_stock(layer) or any(map(is_lazy, layer.parameters())):
        return
    reference = next(
        (t for t in layer.parameters() if t.is_floating_point()), torch.zeros((), device="cpu")
    )
    if reference.is_meta:
        return
    for x in _probes(view, layer, torch.Generator().manual_seed(0), reference):
        try:
            output = _output(layer, x, None)
        except Exception:  # the layer's: it may want inputs of another shape
            continue
        if not isinstance(output, torch.Tensor):
            raise LayerError(
                f"expected a layer that returns a tensor, got a {type(layer).__name__} that "
                f"returns a {type(output).__name__}; leave it out of the targets"
            )
        if isinstance(view, LinearView) and output.shape != (*x.shape[:-1], outputs):
            raise LayerError(
                f"expected outputs of shape {(*x.shape[:-1], outputs)} for inputs of shape "
                f"{tuple(x.shape)}, got {tuple(output.shape)} from a {type(layer).__name__}; "
                "leave it out of the targets"
            )
        return


def _probes(
    view: MatmulView, layer: nn.Module, generator: torch.Generator, like: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Yield inputs of the shapes that a layer may want: a half of their rows is large."""
    if isinstance(view, ConvView):
        steps = zip(view.kernel, view.dilation, view.stride, strict=True)
        sizes = [2 * (d * (k - 1) + 1) + step for k, d, step in steps]
        channels = features_of(layer) * view.groups // math.prod(view.kernel)
        shapes: list[tuple[int, ...]] = [(2, channels, *sizes)]
    else:
        features = features_of(layer)
        shapes = [(2, 3, features), (6, features)]
    for shape in shapes:
        x = torch.randn(shape, generator=generator, device="cpu")
        x[1::2] *= 100
        yield x.to(like.device, like.dtype)


def _output(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor | None) -> Any:
    """Return the output of a copy of a layer in evaluation mode, with another weight.

    The layer's hooks are left out: they act on the adapted layer, and may record what they see.
    """
    twin = _evaluating_copy(layer)
    twin._forward_pre_hooks, twin._forward_hooks = OrderedDict(), OrderedDict()
    if weight is not None:
        twin._parameters = {
            **twin._parameters,
            "weight": nn.Parameter(weight, requires_grad=False),
        }
    with torch.random.fork_rng([]):
        return twin(x)


def _evaluating_copy(module: nn.Module) -> nn.Module:
    """Return a copy that shares all tensors; a forward of the instance stays that of the layer."""
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {
        key: None if child is None else _evaluating_copy(child)
        for key, child in module._modules.items()
    }
    return twin


def check_fit(name: str, layer: nn.Module, features: int) -> None:
    """Check that a layer supports adapters and has the features of its projector.

    Raises
    ------
    ShapeError
        If they differ.
    LayerError
        If the layer is neither linear nor a plain convolution, returns no tensor of its outputs,
        or has no weights yet.
    """
    check_supported(name, layer)
    try:
        execution_device(layer)
    except LayerError as error:
        raise with_context(error, f"layer {name!r}") from error
    if (expected := features_of(layer)) != features:
        raise ShapeError(
            f"layer {name!r}: expected a projector of {expected} features, got {features}; "
            "was it learned on another model?"
        )
