"""Comparison of exported layer names with the layers of the model that a server will build."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from ipa_core.caller_warnings import warn_caller
from ipa_core.errors import SettingError
from ipa_core.settings import check_instance
from ipa_torch.extension import unwrap_model

#: A model as it will be served, on any device, or its class.
ServedModel: TypeAlias = nn.Module | type[PreTrainedModel]


def check_layer_names(names: Collection[str], served: ServedModel, base: nn.Module) -> None:
    """Check that the served model has layers of the exported names.

    Servers look for a layer by its name and ignore a name that they do not find: the adapter is
    loaded, and does nothing.

    Parameters
    ----------
    names : collection of str
        Layers of the base model with the adapter; of fused experts, the module that holds them.
    served : torch.nn.Module or class
        A class is built on the meta device from the configuration of ``base``.
    base : torch.nn.Module
        The base model of the adapter.

    Raises
    ------
    SettingError
        If the served model has none of the layers, is none, or its class takes another
        configuration.

    Warns
    -----
    UserWarning
        If it has only some of them.
    """
    if not (isinstance(served, type) and issubclass(served, PreTrainedModel)):
        form = "a model, a class of transformers' models or None"
        check_instance("check", served, nn.Module, form)
    model = _build(served, base) if isinstance(served, type) else served
    layers = {name for name, _ in unwrap_model(model).named_modules()}
    missing = sorted(name for name in names if name not in layers)
    if not missing:
        return
    count = len(names) - len(missing)
    kind = type(model).__name__
    message = (
        f"expected the layers of the adapter in {kind}, got {count} of {len(names)}: it has no "
        f"{missing[0]!r}{_similar(missing[0], layers)}; a server would ignore these layers; train "
        f"and export the adapter on {kind}"
    )
    if count == 0:
        raise SettingError(message)
    warn_caller(f"{message}; not found: {', '.join(missing)}")


def _build(served: type[PreTrainedModel], base: nn.Module) -> nn.Module:
    config = getattr(base, "config", None)
    if served.config_class is None or not isinstance(config, served.config_class):
        raise SettingError(
            f"check: expected a class that takes {type(config).__name__}, got {served.__name__}; "
            f"pass a model: with torch.device('meta'): {served.__name__}(its configuration)"
        )
    with torch.device("meta"):
        return served(config)


def _similar(name: str, layers: Iterable[str]) -> str:
    """Return a remark on the layer whose name ends as this name does, if there is one."""
    parts = name.split(".")
    for start in range(1, len(parts) - 1):
        ending = ".".join(["", *parts[start:]])
        for layer in layers:
            if layer.endswith(ending):
                return f", but {layer!r}"
    return ""
