"""Methods of a model with adapters that keep their metadata, in place of those of its class."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ipa_hf.adapter_holder import adapter_holder
from ipa_hf.adapter_metadata import AdapterMetadata, attach_metadata, write_metadata
from ipa_hf.weighted_adapter import add_weighted_adapter


def keep_metadata(model: torch.nn.Module, adapter_name: str, metadata: AdapterMetadata) -> None:
    """Attach the metadata of an adapter, and let the model's methods keep and write it."""
    attach_metadata(model, adapter_name, metadata)
    holder = adapter_holder(model)
    is_peft_model = isinstance(holder, PeftModel)
    if hasattr(holder, "save_pretrained"):  # PEFT's mixed models cannot be saved
        holder.save_pretrained = functools.partial(save_pretrained, holder)
    if is_peft_model:
        holder.add_weighted_adapter = functools.partial(add_weighted_adapter, holder)


def save_pretrained(holder: Any, *args: Any, **kwargs: Any) -> None:
    """Save as the class of the holder does, and the metadata into the same directories."""
    save = type(holder).save_pretrained
    save(holder, *args, **kwargs)
    call = inspect.signature(save).bind(holder, *args, **kwargs)
    call.apply_defaults()
    if not call.arguments["is_main_process"]:
        return
    folder = Path(call.arguments["save_directory"])
    if not isinstance(holder, PeftModel):
        for name in holder.active_adapters():  # transformers saves the active one
            write_metadata(holder, name, folder)
        return
    for name in call.arguments["selected_adapters"] or holder.peft_config:
        write_metadata(holder, name, folder if name == "default" else folder / name)
