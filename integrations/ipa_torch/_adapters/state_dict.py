"""State dict of an adapter: a flat dictionary of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from ipa_core.errors import FileFormatError
from ipa_core.settings import check_instance
from ipa_torch._adapters.active_adapter import existing_adapter, list_adapters
from ipa_torch._adapters.adapter_layer import adapter_layers
from ipa_torch._adapters.atomic_change import atomic_change
from ipa_torch._adapters.attach import ProjectionSpec, add_adapter, check_new
from ipa_torch._adapters.layer_replacement import check_replaceable
from ipa_torch._adapters.shared_projection import SharedProjection
from ipa_torch._distributed.parallel_wrappers import check_unwrapped
from ipa_torch._layers.adapter_support import check_fit
from ipa_torch._layers.layer_lookup import get_layer
from ipa_torch._layers.layer_properties import outputs_of
from ipa_torch._layers.unwrap import unwrap_model
from ipa_torch._settings import check_dropout

_LAYER, _PROJECTION = "layers", "projections"
_VERSION_KEY, _VERSION = "format_version", 2


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter: B of each layer, and each P once.

    Returns
    -------
    dict of str to torch.Tensor
        ``layers.NAME.lora_B`` (outputs, rank), ``layers.NAME.projection`` (the number of its P),
        ``projections.NUMBER.weight`` (rank, features), ``.scale`` and ``.trainable``, and
        ``format_version``. Ready for ``safetensors.torch.save_file``; `load_adapter_state_dict`
        reads it.

    Raises
    ------
    SettingError
        If the model has no such adapter.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import adapter_state_dict, attach, fit_projectors
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    >>> attach(model, fit_projectors(model, [torch.randn(8, 16)], rank=2, progress=False))
    >>> sorted(adapter_state_dict(model))[:2]
    ['format_version', 'layers.0.lora_B']
    """
    existing_adapter(model, adapter_name)
    numbers: dict[SharedProjection, int] = {}
    state = {_VERSION_KEY: torch.tensor(_VERSION, device="cpu")}
    for name, layer in adapter_layers(model):
        if adapter_name not in layer.lora_B:
            continue
        projection = layer.projection(adapter_name)
        number = numbers.setdefault(projection, len(numbers))
        state[f"{_LAYER}.{name}.lora_B"] = layer.lora_B[adapter_name].detach()
        state[f"{_LAYER}.{name}.projection"] = torch.tensor(number, device="cpu")
    for projection, number in numbers.items():
        state[f"{_PROJECTION}.{number}.weight"] = projection.weight.detach()
        state[f"{_PROJECTION}.{number}.scale"] = projection.scale
        state[f"{_PROJECTION}.{number}.trainable"] = torch.tensor(
            projection.trainable, device="cpu"
        )
    return state


def load_adapter_state_dict(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    dropout: float = 0.0,
    adapter_name: str = "default",
) -> None:
    """Attach an adapter from its `adapter_state_dict`; it replaces an adapter of the same name.

    Parameters
    ----------
    model : torch.nn.Module
        A model of the same architecture.
    state : mapping of str to torch.Tensor
        A result of `adapter_state_dict`, on any device.
    dropout : float, default 0
        As for `attach`; the state does not include it.
    adapter_name : str, default "default"
        Name of the adapter in this model, which becomes active.

    Raises
    ------
    FileFormatError
        If an entry is missing or does not fit, or the state is of another format version.
    LayerError, ShapeError
        If the model has other layers.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import adapter_state_dict, attach, fit_projectors, load_adapter_state_dict
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    >>> attach(model, fit_projectors(model, [torch.randn(8, 16)], rank=2, progress=False))
    >>> again = torch.nn.Sequential(torch.nn.Linear(16, 4))
    >>> load_adapter_state_dict(again, adapter_state_dict(model))
    """
    check_unwrapped(model)
    model = unwrap_model(model)
    check_instance("adapter_name", adapter_name, str, "a string")
    check_instance("the state of an adapter", state, Mapping, "a mapping", error=FileFormatError)
    check_dropout(dropout)
    layers = _layers(state)
    numbers = dict.fromkeys(number for number, _ in layers.values())
    specs = {number: _spec(state, f"{_PROJECTION}.{number}") for number in numbers}
    for name, (number, lora_B) in layers.items():
        rank, features = specs[number].weight.shape
        layer = get_layer(model, name)
        check_fit(name, layer, features)
        if lora_B.shape != (outputs_of(layer), rank) or not lora_B.is_floating_point():
            raise FileFormatError(
                f"layer {name!r}: expected a floating lora_B of shape {(outputs_of(layer), rank)}, "
                f"got {lora_B.dtype} of shape {tuple(lora_B.shape)}"
            )
    check_replaceable(model, {name: get_layer(model, name) for name in layers})
    layer_specs = {name: specs[number] for name, (number, _) in layers.items()}
    with atomic_change(model, structure=True):
        if adapter_name in list_adapters(model):
            for _, layer in adapter_layers(model):
                if adapter_name in layer.lora_B:
                    layer.remove(adapter_name)
        check_new(model, adapter_name)
        add_adapter(model, layer_specs, dropout, adapter_name)
        adapted = dict(adapter_layers(model))
        for name, (_, lora_B) in layers.items():
            with torch.no_grad():
                adapted[name].lora_B[adapter_name].copy_(lora_B)


def _spec(state: Mapping[str, torch.Tensor], prefix: str) -> ProjectionSpec:
    weight = _entry(state, f"{prefix}.weight")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise FileFormatError(
            f"expected '{prefix}.weight' to be a floating matrix, got {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )
    scale = _number(state, f"{prefix}.scale")
    if not 0 < scale < math.inf:
        raise FileFormatError(f"expected '{prefix}.scale' to be positive and finite, got {scale!r}")
    return ProjectionSpec(weight, scale, bool(_number(state, f"{prefix}.trainable")))


def _number(state: Mapping[str, torch.Tensor], key: str) -> float:
    value = _entry(state, key)
    if value.numel() != 1:
        raise FileFormatError(f"expected {key!r} to be a number, got {value.numel()} of them")
    return float(value)


def _layers(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, torch.Tensor]]:
    version = int(_number(state, _VERSION_KEY)) if _VERSION_KEY in state else 1
    if version != _VERSION:
        cure = "update ipa-projectors" if version > _VERSION else "save the adapter anew"
        raise FileFormatError(
            f"expected the state of an adapter of format version {_VERSION}, got version "
            f"{version}; {cure}"
        )
    names = [
        key.removeprefix(f"{_LAYER}.").removesuffix(".lora_B")
        for key in map(str, state)
        if key.startswith(f"{_LAYER}.") and key.endswith(".lora_B")
    ]
    if not names:
        raise FileFormatError("expected the state of an adapter, got a state without layers")
    return {
        name: (
            int(_number(state, f"{_LAYER}.{name}.projection")),
            _entry(state, f"{_LAYER}.{name}.lora_B"),
        )
        for name in names
    }


def _entry(state: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    if key not in state:
        raise FileFormatError(f"expected an entry {key!r} in the state of an adapter, got none")
    check_instance(f"entry {key!r}", state[key], torch.Tensor, "a tensor", error=FileFormatError)
    return state[key]
