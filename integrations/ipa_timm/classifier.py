"""Classifier of a timm model: its parameters and modules."""

from __future__ import annotations

from torch import nn

from ipa_torch import LayerError
from ipa_torch.extension import classifier_modules, get_layer


def classifier_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the classifier, trained and saved with it, by name.

    Raises
    ------
    LayerError
        If they are on the meta device: offloaded by accelerate, or never loaded.
    """
    ids = {id(p) for head in classifier_modules(model) for p in head.parameters()}
    parameters = {name: p for name, p in model.named_parameters() if id(p) in ids}
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise LayerError(
                f"classifier {name!r}: expected a parameter in memory, as it is trained and saved "
                "with the adapter, got one on the meta device; load it, and keep it from being "
                "offloaded with a device_map"
            )
    return parameters


def modules_of_classifier(model: nn.Module) -> set[int]:
    """Return the ids of the classifier's modules."""
    return {id(module) for head in classifier_modules(model) for module in head.modules()}


def check_outside_classifier(model: nn.Module, name: str) -> None:
    """Check that a layer may have an adapter beside a trained classifier.

    Raises
    ------
    LayerError
        If it is a part of the classifier, or not in the model.
    """
    if id(get_layer(model, name)) in modules_of_classifier(model):
        raise LayerError(
            f"layer {name!r}: it belongs to the classifier, which is trained without an adapter"
        )
