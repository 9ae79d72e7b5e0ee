"""Files of adapters over one A: A once, and a folder for each adapter with its B."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from ipa_core.errors import FileFormatError
from ipa_core.io.atomic_write import replace_file
from ipa_core.io.file_header import FileFormat
from ipa_core.io.paths import input_file, input_path, output_folder
from ipa_core.settings import boolean, check_instance
from ipa_hf.adapter_config_file import read_lora_config, write_lora_config
from ipa_hf.adapter_holder import check_without_adapters
from ipa_hf.adapter_injection import peft_errors, restored_on_error
from ipa_hf.adapter_metadata import FILE_NAME, AdapterMetadata, write_metadata
from ipa_hf.adapter_names import check_adapter_names
from ipa_hf.lora_config import lora_config
from ipa_hf.lora_layers import lora_A_and_B, lora_layers
from ipa_hf.save_pretrained import keep_metadata
from ipa_hf.tied_lora_a import tie_adapter, tied_layers

_A_FILE, _B_FILE = "lora_A.safetensors", "lora_B.safetensors"
_FORMAT = FileFormat("ipa-shared-adapter", 1)


def save_shared(
    peft_model: PeftModel,
    directory: str | os.PathLike[str],
    names: Iterable[str] | None = None,
) -> None:
    """Write the adapters of `share` into one folder, with A once.

    Each file is replaced atomically, A first. The folder of an adapter can be sent by itself to
    those who have A; its digest of A keeps it from another one. For ordinary folders that PEFT
    loads use ``peft_model.save_pretrained``.

    Parameters
    ----------
    peft_model : PeftModel
        From `share` or `load_shared`.
    directory : path-like
        Created if missing. Receives ``lora_A.safetensors``, ``ipa_adapter.json`` if the adapters
        have metadata, and for each adapter a folder of its name with ``lora_B.safetensors`` and
        ``adapter_config.json``.
    names : iterable of str, optional
        By default all adapters of the model.

    Raises
    ------
    SettingError
        If the model has no such adapter, or the adapters do not share A.

    Notes
    -----
    Disk for N adapters: r (features + N outputs) numbers for each layer.

    Examples
    --------
    >>> import pathlib, tempfile, torch
    >>> from transformers import BertConfig, BertModel
    >>> import ipa_hf, ipa_torch
    >>> bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> batch = {"input_ids": torch.randint(0, 99, (2, 6))}
    >>> projectors = ipa_torch.fit_projectors(bert, [batch], 2, targets=["query"], progress=False)
    >>> model = ipa_hf.share(bert, projectors, ["mail", "news"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ipa_hf.save_shared(model, folder)
    ...     sorted(path.name for path in pathlib.Path(folder).iterdir())
    ['ipa_adapter.json', 'lora_A.safetensors', 'mail', 'news']
    """
    check_instance("peft_model", peft_model, PeftModel, "a PeftModel")
    tasks = check_adapter_names(peft_model.peft_config if names is None else names)
    layers = tied_layers(peft_model, tasks)
    a = {name: lora_A_and_B(layer, tasks[0])[0] for name, layer in layers.items()}
    data = to_bytes({name: _contiguous(tensor) for name, tensor in a.items()}, {"format": "pt"})
    header = _FORMAT.seal({"lora_A": hashlib.sha256(data).hexdigest()})
    folder = output_folder(directory)
    for task in tasks:
        output_folder(folder / task)
    replace_file(folder / _A_FILE, data)
    write_metadata(peft_model, tasks[0], folder)
    for task in tasks:
        b = {name: _contiguous(lora_A_and_B(layer, task)[1]) for name, layer in layers.items()}
        replace_file(folder / task / _B_FILE, to_bytes(b, header))
        write_lora_config(lora_config(peft_model, task), folder / task)


def load_shared(
    model: torch.nn.Module,
    directory: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    *,
    is_trainable: bool = False,
) -> PeftModel:
    """Load adapters that `save_shared` wrote, over one A.

    Parameters
    ----------
    model : torch.nn.Module
        The base model, without adapters.
    directory : path-like
        The folder.
    names : iterable of str, optional
        The adapters to load; by default all, in the order of their names.
    is_trainable : bool, default False
        Load for training; A is frozen in any case.

    Returns
    -------
    PeftModel
        The first of the adapters is active.

    Raises
    ------
    MissingFileError
        If a file or an adapter is not there.
    FileFormatError
        If a file is damaged, of other layers, or its B were trained over another A.
    SettingError
        If the model has adapters already.

    Examples
    --------
    >>> import tempfile, torch
    >>> from transformers import BertConfig, BertModel
    >>> import ipa_hf, ipa_torch
    >>> shape = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> bert, batch = BertModel(shape), {"input_ids": torch.randint(0, 99, (2, 6))}
    >>> projectors = ipa_torch.fit_projectors(bert, [batch], 2, targets=["query"], progress=False)
    >>> model = ipa_hf.share(bert, projectors, ["mail", "news"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ipa_hf.save_shared(model, folder)
    ...     loaded = ipa_hf.load_shared(BertModel(shape), folder)
    >>> list(loaded.peft_config)
    ['mail', 'news']
    """
    check_without_adapters(
        model, "load ordinary folders with load_adapter, and join them with ipa_hf.share"
    )
    is_trainable = boolean("is_trainable", is_trainable)
    folder = input_path(directory)
    data = input_file(folder / _A_FILE).read_bytes()
    a = _tensors(folder / _A_FILE, data)
    saved = sorted(path.parent.name for path in folder.glob(f"*/{_B_FILE}"))
    tasks = check_adapter_names(saved if names is None else names)
    b = {task: _read_b(folder / task / _B_FILE, hashlib.sha256(data).hexdigest()) for task in tasks}
    configs = {task: read_lora_config(folder / task) for task in tasks}
    for config in configs.values():
        config.inference_mode = not is_trainable
    with restored_on_error(model):
        return _injected(model, folder, configs, a, b)


def _injected(
    model: torch.nn.Module,
    folder: Path,
    configs: Mapping[str, LoraConfig],
    a: Mapping[str, torch.Tensor],
    b: Mapping[str, Mapping[str, torch.Tensor]],
) -> PeftModel:
    """Return the model with adapters of these configurations and matrices."""
    first, *_ = configs
    with peft_errors(f"the base model of the adapters in {folder}", "load them into that model"):
        peft_model: PeftModel = get_peft_model(model, configs[first], adapter_name=first)
    layers = lora_layers(peft_model, first)
    _write(folder / _A_FILE, {n: lora_A_and_B(x, first)[0] for n, x in layers.items()}, a)
    if (folder / FILE_NAME).is_file():
        keep_metadata(peft_model, first, AdapterMetadata.read(folder))
    for task in configs:
        tie_adapter(peft_model, first, task, configs[task])
        targets = {name: lora_A_and_B(layer, task)[1] for name, layer in layers.items()}
        _write(folder / task / _B_FILE, targets, b[task])
    return peft_model


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous()


def _tensors(path: Path, data: bytes) -> dict[str, torch.Tensor]:
    try:
        return from_bytes(data)
    except SafetensorError as error:
        raise FileFormatError(f"{path}: expected a safetensors file, got {error}") from error


def _read_b(path: Path, digest: str) -> dict[str, torch.Tensor]:
    """Return the matrices B of a file, after a check that they belong to an A."""
    try:
        with safe_open(input_file(path), framework="pt") as file:
            content = _FORMAT.unseal(file.metadata(), path)
        tensors = load_file(path)
    except SafetensorError as error:
        raise FileFormatError(f"{path}: expected a safetensors file, got {error}") from error
    if content.get("lora_A") != digest:
        raise FileFormatError(
            f"{path}: expected the B of adapters over the {_A_FILE} beside them, got those of "
            "another A; copy the folders that were saved together"
        )
    return tensors


@torch.no_grad()
def _write(
    path: Path, targets: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Copy matrices into those of the layers."""
    shapes, expected = (
        {name: tuple(tensor.shape) for name, tensor in group.items()}
        for group in (tensors, targets)
    )
    if shapes != expected:
        name = sorted(shapes.items() ^ expected.items())[0][0]
        raise FileFormatError(
            f"{path}: layer {name!r}: expected shape {expected.get(name)} of the model, got "
            f"{shapes.get(name)}; load it into the base model that it was trained on"
        )
    for name, tensor in tensors.items():
        targets[name].copy_(tensor)
