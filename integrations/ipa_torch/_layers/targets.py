"""Which layers of a model are meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeAlias

from torch import nn

from ipa_core.errors import SettingError
from ipa_torch._layers.matmul_view import Convolution
from ipa_torch.errors import LayerError

Targets: TypeAlias = "str | Iterable[str] | Callable[[str, nn.Module], bool]"

ALL_LINEAR = "all-linear"


def select_layers(model: nn.Module, targets: Targets = ALL_LINEAR) -> dict[str, nn.Module]:
    """Return the layers that ``targets`` names, in the order of ``model.named_modules()``.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    targets : str, iterable of str or callable, default "all-linear"
        The meaning of PEFT's ``target_modules``: a list of names, each a whole name or the end of
        one after a dot; a string is a regular expression for the whole name; ``"all-linear"`` is
        every linear layer (``nn.Linear``, transformers' ``Conv1D``, quantised ones) but the output
        head. A callable ``(name, module) -> bool`` decides itself.

    Returns
    -------
    dict of str to torch.nn.Module

    Raises
    ------
    LayerError
        If nothing matches.
    SettingError
        If a string is no regular expression.

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
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return _checked(_all_linear(model), targets)
    wanted = _matcher(targets)
    named = {
        name: module for name, module in model.named_modules() if name and wanted(name, module)
    }
    if not named:
        known = ", ".join(repr(name) for name, _ in model.named_modules() if name)
        raise LayerError(
            f"expected targets that match a layer of {type(model).__name__}, got {targets!r}; "
            f"its layers are {_shortened(known)}"
        )
    return named


def is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies its input's last axis by a matrix, as far as one can see.

    That is ``nn.Linear``, transformers' ``Conv1D``, whatever wraps such a layer as ``base_layer``,
    and every module with ``in_features`` that contains no other, and no convolution: quantised
    layers come in a dozen classes of as many packages.
    """
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return True
    if isinstance(base := getattr(module, "base_layer", None), nn.Module):
        return is_linear(base)
    return _has_features(module) and not any(
        _has_features(other) or isinstance(other, Convolution)
        for other in module.modules()
        if other is not module
    )


def _has_features(module: nn.Module) -> bool:
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def _all_linear(model: nn.Module) -> dict[str, nn.Module]:
    head = _output_head(model)
    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # What lies inside a chosen layer belongs to it: the matrices of an adapter, for example.
        inside = any(name.startswith(f"{other}.") for other in chosen)
        if name and module is not head and not inside and is_linear(module):
            chosen[name] = module
    return chosen


def _output_head(model: nn.Module) -> nn.Module | None:
    for getter in ("get_output_embeddings", "get_classifier"):
        if callable(get := getattr(model, getter, None)):
            try:
                head = get()
            except (AttributeError, NotImplementedError):
                continue
            if isinstance(head, nn.Module):
                return head
    for name in ("score", "classifier"):
        if isinstance(head := getattr(model, name, None), nn.Module):
            return head
    return None


def _matcher(targets: Targets) -> Callable[[str, nn.Module], bool]:
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise SettingError(
                f"expected a regular expression as targets, got {targets!r} ({error}); "
                "give names as a list"
            ) from error
        return lambda name, module: pattern.fullmatch(name) is not None
    if callable(targets):
        return targets
    names = tuple(targets)
    ends = tuple(f".{name}" for name in names)
    return lambda name, module: name in names or name.endswith(ends)


def _checked(named: dict[str, nn.Module], targets: Targets) -> dict[str, nn.Module]:
    if not named:
        raise LayerError(
            f"expected a model with linear layers for targets={targets!r}, got none; "
            "name the layers with a list, a regular expression or a callable"
        )
    return named


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."
