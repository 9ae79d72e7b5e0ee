"""Models and layers without the wrappers of torch, PEFT and others."""

from __future__ import annotations

from torch import nn

from ipa_core.settings import check_instance


def check_model(model: object) -> None:
    """Check that a model is a module of torch.

    Raises
    ------
    SettingError
        If it is not.
    """
    check_instance("the model", model, nn.Module, "a torch.nn.Module")


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model within the wrappers of `torch.compile` and DDP.

    DDP broadcasts buffers in each forward pass, also in evaluation mode: ranks with unequal numbers
    of batches would deadlock.
    """
    check_model(model)
    while True:
        inner = getattr(model, "_orig_mod", model)
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        if inner is model or not isinstance(inner, nn.Module):
            return model
        model = inner


def unwrap_layer(layer: nn.Module) -> nn.Module:
    """Return the innermost ``base_layer``: that of PEFT's layers and of `AdapterLayer`."""
    while isinstance(base := getattr(layer, "base_layer", None), nn.Module):
        layer = base
    return layer
