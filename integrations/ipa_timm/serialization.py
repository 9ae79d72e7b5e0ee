"""An adapter and its classifier as one small safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from ipa_core.errors import FileFormatError, ShapeError
from ipa_core.io.serialization import replace_file
from ipa_timm.adapters import prepare_for_training
from ipa_timm.classifier import head_parameters
from ipa_torch import adapter_state_dict, load_adapter_state_dict
from ipa_torch._layers.unwrap import unwrap_model

FORMAT, VERSION = "ipa-timm-adapter", 1
_HEAD = "head."


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write P, B and the classifier to a safetensors file, whole or not at all.

    Parameters
    ----------
    model : torch.nn.Module
        With an adapter, from `adapt`, `attach` or `load`.
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
    >>> again = timm.create_model("test_vit", num_classes=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ipa_timm.save(model, f"{folder}/adapter.safetensors")
    ...     ipa_timm.load(again, f"{folder}/adapter.safetensors")
    """
    model = unwrap_model(model)
    state = adapter_state_dict(model)
    state |= {f"{_HEAD}{name}": p.detach() for name, p in head_parameters(model).items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "architecture": _architecture(model),
    }
    tensors = {key: value.contiguous() for key, value in state.items()}
    replace_file(Path(path), to_bytes(tensors, metadata))


def load(model: nn.Module, path: str | os.PathLike[str], *, dropout: float = 0.0) -> None:
    """Put a saved adapter and classifier into a model of the same architecture, to use or train on.

    An adapter that the model has already is replaced.

    Parameters
    ----------
    model : torch.nn.Module
        With the base weights that the adapter was trained beside.
    path : path-like
        What `save` wrote.
    dropout : float, default 0
        As for `attach`.

    Raises
    ------
    FileFormatError
        If the file is not one of `save`'s, or of another architecture, or of a newer version.
    ShapeError
        If the classifier has other classes, or a layer another shape.
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
    ...     ipa_timm.save(model, f"{folder}/adapter.safetensors")
    ...     ipa_timm.load(base, f"{folder}/adapter.safetensors")
    >>> torch.equal(base(images), model(images))
    True
    """
    model = unwrap_model(model)
    state, head = _read(path, _architecture(model))
    own = head_parameters(model)
    for name in sorted(own.keys() | head.keys()):
        expected, got = (tuple(part[name].shape) if name in part else None for part in (own, head))
        if expected != got:
            raise ShapeError(
                f"{path}: expected a classifier {name!r} of shape {expected}, got {got}; "
                "create the model with the num_classes that the adapter was trained for"
            )
    load_adapter_state_dict(model, state, dropout=dropout)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(head[name])
    prepare_for_training(model)


def _read(
    path: str | os.PathLike[str], architecture: str
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise FileFormatError(f"{path}: expected an adapter that ipa_timm.save wrote")
            if int(metadata["version"]) > VERSION:
                raise FileFormatError(
                    f"{path}: expected format version {VERSION} or older, got "
                    f"{metadata['version']}; update ipa-projectors"
                )
            if architecture != metadata["architecture"]:
                raise FileFormatError(
                    f"{path}: expected an adapter of {architecture}, got one of "
                    f"{metadata['architecture']}"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FileFormatError(f"{path}: expected a safetensors file, got {error}") from error
    head = {k.removeprefix(_HEAD): v for k, v in tensors.items() if k.startswith(_HEAD)}
    return {k: v for k, v in tensors.items() if not k.startswith(_HEAD)}, head


def _architecture(model: nn.Module) -> str:
    """Return the name that timm knows the architecture by, its class's where it has none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__
