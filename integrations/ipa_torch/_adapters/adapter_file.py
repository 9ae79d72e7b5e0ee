"""Adapter files: the tensors of an adapter in safetensors, with sizes and a digest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from ipa_core.errors import FileFormatError
from ipa_core.io.atomic_write import replace_file
from ipa_core.io.file_header import FileFormat
from ipa_core.io.paths import input_file
from ipa_torch._adapters.state_dict import adapter_state_dict, load_adapter_state_dict

_FORMAT = FileFormat("ipa-adapter-tensors", 1)


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, adapter_name: str = "default"
) -> None:
    """Write P and B of an adapter to a safetensors file, atomically.

    The file has the sizes of all tensors and a digest.

    Parameters
    ----------
    model : torch.nn.Module
        With an adapter.
    path : path-like
        The file; its folder must exist.
    adapter_name : str, default "default"

    Raises
    ------
    SettingError
        If the model has no such adapter.
    PathError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile, torch
    >>> from ipa_torch import attach, fit_projectors, load_adapter, save_adapter
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    >>> attach(model, fit_projectors(model, [torch.randn(8, 16)], rank=2, progress=False))
    >>> again = torch.nn.Sequential(torch.nn.Linear(16, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapter(model, f"{folder}/adapter.safetensors")
    ...     load_adapter(again, f"{folder}/adapter.safetensors")
    """
    write_adapter_file(path, adapter_state_dict(model, adapter_name), {"library": "ipa_torch"})


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dropout: float = 0.0,
    adapter_name: str = "default",
) -> None:
    """Attach an adapter from a file of `save_adapter`; it replaces an adapter of the same name.

    Parameters
    ----------
    model, dropout, adapter_name
        As for `load_adapter_state_dict`.
    path : path-like
        The file.

    Raises
    ------
    FileFormatError
        If the file is no adapter file of this package, is damaged, or of another version; nothing
        changes then.
    LayerError, ShapeError
        If the model has other layers.
    MissingFileError
        If there is no file.

    Examples
    --------
    See `save_adapter`, and for a file that is not there:

    >>> import torch
    >>> from ipa_core.errors import MissingFileError
    >>> from ipa_torch import load_adapter
    >>> try:
    ...     load_adapter(torch.nn.Linear(2, 2), "absent")
    ... except MissingFileError as error:
    ...     print(error.args[0])
    absent: expected a file or folder, got no such path
    """
    content, state = read_adapter_file(path)
    if content["library"] != "ipa_torch":
        raise FileFormatError(
            f"{path}: expected a file of ipa_torch.save_adapter, got one of {content['library']}; "
            f"load it with {content['library']}.load_adapter"
        )
    load_adapter_state_dict(model, state, dropout=dropout, adapter_name=adapter_name)


def write_adapter_file(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]
) -> None:
    """Write tensors, and further JSON content with the key ``library``, atomically."""
    whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    sealed = _FORMAT.seal({**content, "tensors": _sizes(whole)}, _bytes(whole))
    replace_file(path, to_bytes(whole, sealed))


def read_adapter_file(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the content and the tensors of an adapter file, after a check of sizes and digest.

    Raises
    ------
    FileFormatError
        If the file is no adapter file, is damaged, or of another version.
    """
    try:
        with safe_open(input_file(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileFormatError(f"{path}: expected a safetensors file, got {error}") from error
    content = _FORMAT.unseal(header, path, _bytes(tensors))
    if content.get("tensors") != _sizes(tensors):
        raise FileFormatError(f"{path}: expected tensors of the sizes in the header, got others")
    return content, tensors


def _sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Any]]:
    return {key: [str(value.dtype), list(value.shape)] for key, value in sorted(tensors.items())}


def _bytes(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the bytes of tensors, also of dtypes that NumPy does not have."""
    return {key: value.reshape(-1).view(torch.uint8).numpy() for key, value in tensors.items()}
