"""Loading an adapter so that what was frozen is frozen again."""

from __future__ import annotations

import os

import torch
from peft import PeftModel

from ipa_hf.adapter_metadata import AdapterRecord, attach_metadata
from ipa_hf.freezing import freeze_projections


def load(
    model: torch.nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """Load an adapter that `PeftModel.save_pretrained` wrote, with its record.

    PEFT's own ``PeftModel.from_pretrained`` gives the same outputs. This also restores which
    projections are held fixed when training goes on, and lets the next ``save_pretrained`` write
    the record again.

    Parameters
    ----------
    model : torch.nn.Module
        The base model; or a `PeftModel` with a LoRA adapter, which gets another one.
    directory : path-like
        The adapter directory.
    adapter_name : str, default "default"
        Name for the adapter in this model.
    is_trainable : bool, default False
        Load for training: B, and A unless it is frozen.

    Returns
    -------
    PeftModel
        The model itself where it is one already.

    Raises
    ------
    FileFormatError
        If the directory holds no record, or one of a newer version.

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
    ...     again = ipa_hf.load(BertModel(shape), folder, is_trainable=True)
    >>> [name.split(".")[-3] for name, p in again.named_parameters() if p.requires_grad]
    ['lora_B']
    """
    record = AdapterRecord.read(directory)
    if isinstance(model, PeftModel):
        model.load_adapter(str(directory), adapter_name, is_trainable=is_trainable)
    else:
        model = PeftModel.from_pretrained(
            model, str(directory), adapter_name=adapter_name, is_trainable=is_trainable
        )
    attach_metadata(model, adapter_name, record)
    if record.frozen:
        freeze_projections(model, adapter_name, layers=record.layers)
    return model
