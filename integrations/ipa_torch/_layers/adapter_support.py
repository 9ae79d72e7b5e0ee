"""Check that an adapter may be added to the output of a layer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ipa_core.errors import ShapeError, with_context
from ipa_torch._layers.execution_device import execution_device
from ipa_torch._layers.layer_probe import output_of_copy, probe_inputs
from ipa_torch._layers.layer_properties import features_of, is_stock, outputs_of
from ipa_torch._layers.linear_view import LinearView
from ipa_torch._layers.matmul_view import MatmulView, view_of
from ipa_torch.errors import LayerError


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
    for x in probe_inputs(view, layer, torch.Generator().manual_seed(0), reference):
        try:
            output = output_of_copy(layer, x, None)
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
