"""Load an adapter together with its metadata and frozen flags."""

from __future__ import annotations

import os

import torch
from peft import PeftModel

from ipa_hf.adapter_metadata import AdapterMetadata
from ipa_hf.freezing import freeze_projections
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
        Name of the adapter in this model.
    is_trainable : bool, default False
        Load for training: B, and A unless it is frozen.

    Returns
    -------
    PeftModel
        ``model`` itself if it is a `PeftModel`.

    Raises
    ------
    FileFormatError
        If the directory holds no metadata, or metadata of another format version.

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
    metadata = AdapterMetadata.read(directory)
    if isinstance(model, PeftModel):
        model.load_adapter(str(directory), adapter_name, is_trainable=is_trainable)
    else:
        model = PeftModel.from_pretrained(
            model, str(directory), adapter_name=adapter_name, is_trainable=is_trainable
        )
    keep_metadata(model, adapter_name, metadata)
    if metadata.frozen:
        freeze_projections(model, adapter_name, layers=metadata.layers)
    return model
