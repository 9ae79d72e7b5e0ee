"""Output head of a model."""

from __future__ import annotations

from typing import Any

from torch import nn


def output_head(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model's output head: usually one, none if it cannot be found."""
    for getter in ("get_output_embeddings", "get_classifier"):
        if modules := _modules_of(model, getter):
            return modules
    named = (getattr(model, name, None) for name in ("score", "classifier"))
    return [module for module in named if isinstance(module, nn.Module)][:1]


def classifier_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of ``get_classifier()``: several in a distilled model."""
    return _modules_of(model, "get_classifier")


def _modules_of(model: nn.Module, getter: str) -> list[nn.Module]:
    if not callable(get := getattr(model, getter, None)):
        return []
    try:
        return _flattened(get())
    except (AttributeError, NotImplementedError):  # the getter of a model without a head
        return []


def _flattened(heads: Any) -> list[nn.Module]:
    """Return the modules in a module or a nested sequence of modules."""
    if isinstance(heads, nn.Module):
        return [heads]
    if isinstance(heads, (tuple, list)):
        return [module for head in heads for module in _flattened(head)]
    return []


def tied_to_embedding(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose weight is that of an embedding: output heads."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module._parameters.get("weight")) in tables
    ]
