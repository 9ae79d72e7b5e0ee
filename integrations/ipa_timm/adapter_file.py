"""Serialization of an adapter and its classifier to one safetensors file."""

from __future__ import annotations

import os

import torch
from torch import nn

from ipa_core.errors import FileFormatError, ShapeError
from ipa_timm.adapters import prepare_for_training
from ipa_timm.classifier import classifier_parameters
from ipa_torch import adapter_state_dict, load_adapter_state_dict
from ipa_torch.extension import (
    atomic_change,
    read_adapter_file,
    unwrap_model,
    write_adapter_file,
)

_LIBRARY, _CLASSIFIER = "ipa_timm", "classifier."


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write P, B and the classifier to a safetensors file, atomically.

    Parameters
    ----------
    model : torch.nn.Module
        With an adapter, from `adapt`, `attach` or `load_adapter`.
    path : path-like
        The file; its folder must exist.

    Raises
    ------
    SettingError
        If the model has no adapter.

    Examples
    --------
    >>> import tempfile, timm, torch
    >>> import ipa_timm
    >>> model = timm.create_model("test_vit", num_classes=2)
    >>> _ = ipa_timm.adapt(model, [torch.randn(2, 3, 160, 160)], rank=4, progress=False)
    >>> fresh = timm.create_model("test_vit", num_classes=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ipa_timm.save_adapter(model, f"{folder}/adapter.safetensors")
    ...     ipa_timm.load_adapter(fresh, f"{folder}/adapter.safetensors")
    """
    model = unwrap_model(model)
    state = adapter_state_dict(model)
    state |= {
        f"{_CLASSIFIER}{name}": p.detach() for name, p in classifier_parameters(model).items()
    }
    content = {"library": _LIBRARY, "architecture": _architecture(model)}
    write_adapter_file(path, state, content)


def load_adapter(model: nn.Module, path: str | os.PathLike[str], *, dropout: float = 0.0) -> None:
    """Load a saved adapter and classifier into a model of the same architecture.

    An existing adapter of the model is replaced.

    Parameters
    ----------
    model : torch.nn.Module
        With the base weights that the adapter was trained with.
    path : path-like
        A file that `save_adapter` wrote.
    dropout : float, default 0
        As for `attach`.

    Raises
    ------
    FileFormatError
        If the file is no adapter file, or of another architecture or format version.
    ShapeError
        If the classifier has another number of classes, or a layer another shape.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import copy, tempfile, timm, torch
    >>> import ipa_timm
    >>> base = timm.create_model("test_vit", num_classes=2).eval()
    >>> model, images = copy.deepcopy(base), torch.randn(2, 3, 160, 160)
    >>> projectors = ipa_timm.adapt(model, [images], rank=4, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ipa_timm.save_adapter(model, f"{folder}/adapter.safetensors")
    ...     ipa_timm.load_adapter(base, f"{folder}/adapter.safetensors")
    >>> torch.equal(base(images), model(images))
    True
    """
    plain = unwrap_model(model)
    state, saved = _read(path, _architecture(plain))
    classifier = classifier_parameters(plain)
    for name in sorted(classifier.keys() | saved.keys()):
        expected, got = (
            tuple(tensors[name].shape) if name in tensors else None
            for tensors in (classifier, saved)
        )
        if expected != got:
            raise ShapeError(
                f"{path}: expected a classifier {name!r} of shape {expected}, got {got}; "
                "create the model with the num_classes that the adapter was trained for"
            )
    with atomic_change(model, structure=True, tensors=classifier.values()), torch.no_grad():
        load_adapter_state_dict(model, state, dropout=dropout)
        for name, parameter in classifier.items():
            parameter.copy_(saved[name])
        prepare_for_training(plain)


def _read(
    path: str | os.PathLike[str], architecture: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    content, tensors = read_adapter_file(path)
    if content["library"] != _LIBRARY:
        raise FileFormatError(
            f"{path}: expected a file that ipa_timm.save_adapter wrote, got one of "
            f"{content['library']}; load it with {content['library']}.load_adapter"
        )
    if content["architecture"] != architecture:
        raise FileFormatError(
            f"{path}: expected an adapter of {architecture}, got one of "
            f"{content['architecture']}; create the model that the adapter was trained on"
        )
    saved = {name for name in tensors if name.startswith(_CLASSIFIER)}
    classifier = {name.removeprefix(_CLASSIFIER): tensors.pop(name) for name in saved}
    return tensors, classifier


def _architecture(model: nn.Module) -> str:
    """Return timm's name of the architecture, or the class name if it has none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__
