"""Find a layer of a model below the wrappers of torch."""

from __future__ import annotations

from torch import nn

from ipa_core.errors import ShapeError, with_context
from ipa_torch._layers.matmul_view import view_of
from ipa_torch._layers.sizes import features_of
from ipa_torch.errors import LayerError


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` or DDP may have wrapped.

    In each forward pass DDP sends buffers round, in evaluation too: workers with unequal numbers of
    batches would wait for each other for ever.
    """
    while True:
        inner = getattr(model, "_orig_mod", model)
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        if inner is model or not isinstance(inner, nn.Module):
            return model
        model = inner


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """Return a layer by name.

    Raises
    ------
    LayerError
        If there is none, or it is the model itself, or one whose forward never runs.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise LayerError(f"expected a layer of the model, got {name!r}: {error}") from error
    parent = model.get_submodule(name.rpartition(".")[0])
    if layer is model:
        raise LayerError(
            "expected a layer inside the model, got the model; wrap it in a Sequential"
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise LayerError(
            f"layer {name!r}: expected a layer whose forward runs, got one that "
            "nn.MultiheadAttention reads the weight of; leave it out"
        )
    return layer


def check_fit(name: str, layer: nn.Module, features: int) -> None:
    """Hold a projector's features against those of its layer.

    Raises
    ------
    ShapeError
        If they differ.
    LayerError
        If the layer is no matrix.
    """
    try:
        view_of(layer)
        own = features_of(layer)
    except LayerError as error:
        raise with_context(error, f"layer {name!r}") from error
    if own != features:
        raise ShapeError(
            f"layer {name!r}: expected a projector of {own} features, got one of {features}; "
            "was it learned on another model?"
        )
