"""Classifier parameters of a timm model."""

from __future__ import annotations

from torch import nn

from ipa_torch.extension import classifier_modules


def classifier_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the classifier by their names in the model."""
    ids = {id(p) for head in classifier_modules(model) for p in head.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in ids}
