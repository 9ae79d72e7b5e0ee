"""Classifier modules and parameters of a timm model."""

from __future__ import annotations

from typing import Any

from torch import nn


def classifier_modules(model: nn.Module) -> list[nn.Module]:
    """Return the classifier's modules: several in a distilled model, none without a head."""
    getter = getattr(model, "get_classifier", None)
    return _modules(getter()) if callable(getter) else []


def classifier_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the classifier by their names in the model."""
    ids = {id(p) for head in classifier_modules(model) for p in head.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in ids}


def _modules(heads: Any) -> list[nn.Module]:
    """Return the modules in a module or a nested sequence of modules."""
    if isinstance(heads, nn.Module):
        return [heads]
    if isinstance(heads, (tuple, list)):
        return [module for head in heads for module in _modules(head)]
    return []
