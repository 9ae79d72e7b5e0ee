"""Selection of a model's layers by targets."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import nn

from ipa_core.errors import SettingError
from ipa_core.settings import check_instance, check_iterable
from ipa_torch._layers.layer_properties import is_linear
from ipa_torch._layers.output_head import output_head, tied_to_embedding
from ipa_torch._layers.unwrap import check_model
from ipa_torch.errors import LayerError

Targets: TypeAlias = "str | Iterable[str] | Callable[[str, nn.Module], bool]"

ALL_LINEAR = "all-linear"


def select_layers(model: nn.Module, targets: Targets = ALL_LINEAR) -> dict[str, nn.Module]:
    """Return the layers that ``targets`` select, in the order of ``model.named_modules()``.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    targets : str, iterable of str or callable, default "all-linear"
        As PEFT's ``target_modules``: a list of names, each a full name or the end of one after a
        dot; a string is a regular expression for the full name; ``"all-linear"`` is every linear
        layer (``nn.Linear``, transformers' ``Conv1D``, quantized layers, those of graph libraries)
        but the output head, layers with an embedding's weight, and scripted ones, which run no
        hooks. Or a callable ``(name, module) -> bool``.

    Returns
    -------
    dict of str to torch.nn.Module

    Raises
    ------
    LayerError
        If nothing matches.
    SettingError
        If a string is not a regular expression.

    Examples
    --------
    >>> from torch import nn
    >>> from ipa_torch import select_layers
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> list(select_layers(model))
    ['0', '2']
    >>> list(select_layers(model, ["2"]))
    ['2']
    """
    check_model(model)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return _require_some(_all_linear(model), targets)
    matches = _matcher(targets)
    named = {
        name: module for name, module in model.named_modules() if name and matches(name, module)
    }
    if not named:
        names = ", ".join(repr(name) for name, _ in model.named_modules() if name)
        raise LayerError(
            f"expected targets that match a layer of {type(model).__name__}, got {targets!r}; "
            f"its layers are {_shortened(names)}"
        )
    return named


def _all_linear(model: nn.Module) -> dict[str, nn.Module]:
    head = [*output_head(model), *tied_to_embedding(model)]
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # Modules inside a selected layer belong to it: the matrices of an adapter, for example.
        inside = any(name.startswith(f"{layer}.") for layer in layers)
        excluded = isinstance(module, torch.jit.ScriptModule) or any(
            module is part for part in head
        )
        if name and not inside and is_linear(module) and not excluded:
            layers[name] = module
    return layers


def _matcher(targets: Targets) -> Callable[[str, nn.Module], bool]:
    if isinstance(targets, str):
        pattern = compile_pattern(targets)
        return lambda name, module: pattern.fullmatch(name) is not None
    form = "a regular expression, names of layers or a function of name and module"
    if isinstance(targets, (type, nn.Module)):
        raise SettingError(f"expected targets to be {form}, got {reprlib.repr(targets)}")
    if callable(targets):
        return targets
    check_iterable("targets", targets, form)
    names = tuple(targets)
    for name in names:
        check_instance("each name of the targets", name, str, "a string")
    ends = tuple(f".{name}" for name in names)
    return lambda name, module: name in names or name.endswith(ends)


def compile_pattern(targets: str) -> re.Pattern[str]:
    """Return targets that are a regular expression, compiled.

    Raises
    ------
    SettingError
        If they are none.
    """
    check_instance("targets", targets, str, "a regular expression")
    try:
        return re.compile(targets)
    except re.error as error:
        raise SettingError(
            f"expected a regular expression as targets, got {targets!r} ({error}); "
            "give names as a list"
        ) from error


def _require_some(named: dict[str, nn.Module], targets: Targets) -> dict[str, nn.Module]:
    if not named:
        raise LayerError(
            f"expected a model with linear layers for targets={targets!r}, got none; "
            "name the layers with a list, a regular expression or a callable"
        )
    return named


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."
