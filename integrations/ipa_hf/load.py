"""Load an adapter together with its metadata and frozen flags."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import PeftModel

from ipa_core.errors import FileFormatError, MissingFileError, SettingError
from ipa_core.io.paths import as_path
from ipa_core.settings import boolean
from ipa_hf.adapter_config_file import read_lora_config
from ipa_hf.adapter_holder import check_without_adapters
from ipa_hf.adapter_injection import peft_errors, restored_on_error
from ipa_hf.adapter_metadata import AdapterMetadata
from ipa_hf.adapter_names import check_adapter_name
from ipa_hf.freezing import freeze_projections
from ipa_hf.layer_names import layer_name
from ipa_hf.lora_layers import lora_layers
from ipa_hf.save_pretrained import keep_metadata


def load_adapter(
    model: torch.nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """Load an adapter that `PeftModel.save_pretrained` wrote, with its metadata.

    ``PeftModel.from_pretrained`` gives the same outputs. This function also freezes A again if it
    was frozen, and makes the next ``save_pretrained`` write the metadata.

    Parameters
    ----------
    model : torch.nn.Module
        The base model, or a `PeftModel` to which the adapter is added.
    directory : path-like
        The adapter directory.
    adapter_name : str, default "default"
        Name of the adapter in this model; a new one.
    is_trainable : bool, default False
        Load for training: B, and A unless it is frozen.

    Returns
    -------
    PeftModel
        ``model`` itself if it is a `PeftModel`.

    Raises
    ------
    SettingError
        If the model has an adapter of this name already, or PEFT cannot load the adapter into it.
    MissingFileError
        If there are no weights, or there is no configuration.
    FileFormatError
        If the directory holds no metadata, metadata of another format version, or those of layers
        that the model does not have.

    Notes
    -----
    After an error the model has the adapters that it had before.

    Examples
    --------
    >>> import tempfile, torch
    >>> from peft import LoraConfig
    >>> from transformers import BertConfig, BertModel
    >>> import ipa_hf
    >>> shape = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> loader = [{"input_ids": torch.randint(0, 99, (4, 6))}]
    >>> config = LoraConfig(r=2, target_modules=["query"])
    >>> model = ipa_hf.get_ipa_model(BertModel(shape), config, loader, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(folder)
    ...     loaded = ipa_hf.load_adapter(BertModel(shape), folder, is_trainable=True)
    >>> [name.split(".")[-3] for name, p in loaded.named_parameters() if p.requires_grad]
    ['lora_B']
    """
    check_adapter_name(adapter_name)
    is_trainable = boolean("is_trainable", is_trainable)
    if isinstance(model, PeftModel):
        _check_new(model, adapter_name)
    else:
        check_without_adapters(model, "load the adapter with the model's own load_adapter")
    folder = as_path(directory)
    metadata = AdapterMetadata.read(folder)
    _check_files(folder)
    trained_on = f"the base model of the adapter in {folder}"
    with restored_on_error(model), peft_errors(trained_on, "load it into that model"):
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
            peft_model = model
        else:
            peft_model = PeftModel.from_pretrained(
                model, str(folder), adapter_name=adapter_name, is_trainable=is_trainable
            )
        return _with_metadata(peft_model, adapter_name, metadata, folder)


def _check_new(model: PeftModel, adapter_name: str) -> None:
    """Check that no adapter would be overwritten, under the settings of the old one."""
    if adapter_name in model.peft_config:
        raise SettingError(
            f"expected the name of a new adapter, got {adapter_name!r} among "
            f"{sorted(model.peft_config)}; choose another adapter_name, or remove that adapter "
            "with delete_adapter()"
        )


def _check_files(folder: Path) -> None:
    """Check that the files of PEFT are there: it would look for missing ones on a server."""
    read_lora_config(folder)
    names = ("adapter_model.safetensors", "adapter_model.bin")
    if not any((folder / name).is_file() for name in names):
        raise MissingFileError(
            f"{folder}: expected {names[0]}, got no such file; copy the folder as it was saved"
        )


def _with_metadata(
    model: PeftModel, adapter_name: str, metadata: AdapterMetadata, folder: Path
) -> PeftModel:
    """Attach metadata to an adapter, after a check that the model has all its layers."""
    missing = {layer_name(slot) for slot in metadata.layers} - {*lora_layers(model, adapter_name)}
    if missing:
        raise FileFormatError(
            f"{folder}: expected an adapter of the model's layers, got {sorted(missing)[0]!r}, "
            "which it does not have; load it into the model that it was trained on"
        )
    keep_metadata(model, adapter_name, metadata)
    if metadata.frozen:
        freeze_projections(model, adapter_name, layers=metadata.layers)
    return model
