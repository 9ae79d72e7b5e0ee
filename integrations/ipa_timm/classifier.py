"""The classifier of a model, whatever it is called."""

from __future__ import annotations

from typing import Any

from torch import nn


def heads_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the classifier: one, several in a distilled model, or none."""
    getter = getattr(model, "get_classifier", None)
    return _modules(getter()) if callable(getter) else []


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the classifier by their names in the model."""
    own = {id(p) for head in heads_of(model) for p in head.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in own}


def _modules(found: Any) -> list[nn.Module]:
    if isinstance(found, nn.Module):
        return [found]
    return [m for one in found for m in _modules(one)] if isinstance(found, (tuple, list)) else []
