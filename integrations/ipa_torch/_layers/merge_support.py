"""Check on a probe input that an adapter may be merged into the weight of a layer."""

from __future__ import annotations

import torch
from torch import nn

from ipa_torch._layers.layer_probe import output_of_copy, probe_inputs
from ipa_torch._layers.layer_properties import features_of, is_stock, outputs_of
from ipa_torch._layers.matmul_view import MatmulView, view_of

#: Share of the change of the output by which adding and merging may differ.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 5e-2


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
    for x in probe_inputs(view, layer, generator, weight):
        try:
            before, after = output_of_copy(layer, x, weight), output_of_copy(layer, x, merged)
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
