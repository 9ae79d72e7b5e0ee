"""Active adapter of a model: list, set, disable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ipa_core.errors import SettingError
from ipa_core.settings import check_instance
from ipa_torch._adapters.adapter_layer import AdapterLayer, adapter_layers
from ipa_torch._adapters.atomic_change import atomic_change
from ipa_torch._adapters.pass_lock import changing


def list_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters of a model.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import list_adapters, attach, fit_projectors
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    >>> attach(model, fit_projectors(model, [torch.randn(8, 16)], rank=2, progress=False))
    >>> list_adapters(model)
    ['default']
    """
    return list(dict.fromkeys(name for _, layer in adapter_layers(model) for name in layer.lora_B))


def set_adapter(model: nn.Module, adapter_name: str | None) -> None:
    """Activate an adapter, and train only its parameters; None for none.

    Raises
    ------
    SettingError
        If the model has no such adapter.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import attach, fit_projectors, set_adapter
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    >>> attach(model, fit_projectors(model, [torch.randn(8, 16)], rank=2, progress=False))
    >>> set_adapter(model, None)
    >>> any(parameter.requires_grad for parameter in model.parameters())
    False
    """
    if adapter_name is not None:
        existing_adapter(model, adapter_name)
    with atomic_change(model):
        for _, layer in adapter_layers(model):
            layer.active = (
                adapter_name if adapter_name is not None and adapter_name in layer.lora_B else None
            )
            for parameter in layer.adapter_parameters():
                parameter.requires_grad_(False)
        for _, layer in adapter_layers(model):
            if layer.active is not None:
                for parameter in layer.adapter_parameters(layer.active):
                    parameter.requires_grad_(True)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Disable all adapters, also merged ones, within a context. Their tensors do not change.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import disable_adapter
    >>> model = torch.nn.Linear(2, 2)
    >>> with disable_adapter(model):
    ...     y = model(torch.ones(1, 2))
    """
    before: list[tuple[AdapterLayer, str | None, str | None]] = []
    try:
        with atomic_change(model):
            before += [(layer, layer.active, layer.merged) for _, layer in adapter_layers(model)]
            for layer, _, _ in before:
                layer.active = None
                layer.unmerge()
        yield
    finally:
        try:
            _enable(model, before)
        except BaseException:  # an interruption, say
            _enable(model, before)
            raise


def _enable(model: nn.Module, before: list[tuple[AdapterLayer, str | None, str | None]]) -> None:
    """Give adapter layers the active and merged adapters that they had."""
    with changing(model):
        for layer, active, _ in before:
            layer.active = active
        for layer, _, merged in before:
            if merged is not None:
                layer.merge(merged)


def existing_adapter(model: nn.Module, adapter_name: str) -> str:
    """Return the name of an adapter, after a check that the model has it."""
    check_instance("adapter_name", adapter_name, str, "a string")
    if adapter_name not in (known := list_adapters(model)):
        raise SettingError(f"expected an adapter among {known}, got {adapter_name!r}")
    return adapter_name
