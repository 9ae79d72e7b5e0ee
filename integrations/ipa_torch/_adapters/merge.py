"""Merge an adapter into the weights of a model, and restore these."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ipa_core.caller_warnings import warn_caller
from ipa_core.errors import SettingError
from ipa_torch._adapters.active_adapter import existing_adapter, list_adapters
from ipa_torch._adapters.adapter_layer import AdapterLayer, adapter_layers
from ipa_torch._adapters.atomic_change import atomic_change
from ipa_torch.errors import LayerError


def merge(model: nn.Module, adapter_name: str | None = None) -> None:
    """Merge an adapter into the weights: no cost at inference until `unmerge`.

    No weight is written: each layer gets a new weight and keeps the old one.

    Parameters
    ----------
    model : torch.nn.Module
    adapter_name : str, optional
        By default the active adapter.

    Raises
    ------
    LayerError
        If a layer does not compute W x + b with a floating weight of its own, as far as a probe
        input shows, or was called with other arguments than x; nothing is merged then. In a later
        pass, if a merged layer is called with other arguments.
    SettingError
        If the model has no such adapter, or no adapter is active.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import attach, fit_projectors, merge, unmerge
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    >>> attach(model, fit_projectors(model, [torch.randn(8, 16)], rank=2, progress=False))
    >>> merge(model)
    >>> unmerge(model)
    """
    if adapter_name is not None:
        existing_adapter(model, adapter_name)
    selected = [
        (name, layer, wanted)
        for name, layer in adapter_layers(model)
        if (wanted := adapter_name or layer.active or "") in layer.lora_B
    ]
    if not selected:
        raise SettingError(
            f"expected an adapter among {list_adapters(model)}, got {adapter_name!r}"
        )
    for name, layer, _ in selected:
        if (reason := layer.merge_obstacle()) is not None:
            raise LayerError(f"layer {name!r}: {reason}; leave the adapters unmerged")
    with atomic_change(model):
        for _, layer, wanted in selected:
            layer.merge(wanted)


def unmerge(model: nn.Module) -> None:
    """Restore the old weights, bit by bit.

    Examples
    --------
    See `merge`.

    >>> import torch
    >>> from ipa_torch import unmerge
    >>> unmerge(torch.nn.Linear(2, 2))  # no effect without a merged adapter
    """
    with atomic_change(model):
        for _, layer in adapter_layers(model):
            layer.unmerge()


def warn_of_merged_weights(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """Warn of merged weights that other code of the model reads, or that were tied."""
    held = {id(parameter) for parameter in model.parameters()}
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    tied = [name for name, layer in merged.items() if id(layer.weight) in held]
    read = [name for name, layer in merged.items() if layer.weight_read]
    for names, consequence in (
        (tied, "was tied, and the merged weight is not: a tied model cannot load its state dict"),
        (read, "is read by the model without a call, if only for its dtype: what is computed with "
               "it changes with `detach`; compare outputs, or do not detach"),
    ):  # fmt: skip
        if names:
            warn_caller(
                f"the weight of layer {names[0]!r} and {len(names) - 1} more {consequence}",
            )
