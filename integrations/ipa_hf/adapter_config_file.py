"""Configuration file of an adapter, ``adapter_config.json``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from peft import LoraConfig

from ipa_core.errors import FileFormatError
from ipa_core.io.atomic_write import replace_file
from ipa_core.io.paths import input_file
from ipa_core.settings import check_instance

_FILE_NAME = "adapter_config.json"


def write_lora_config(config: LoraConfig, folder: Path) -> None:
    """Write a configuration into an adapter directory, atomically."""
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        replace_file(folder / _FILE_NAME, (Path(scratch) / _FILE_NAME).read_bytes())


def read_lora_config(folder: Path) -> LoraConfig:
    """Read the configuration of an adapter directory.

    Raises
    ------
    MissingFileError
        If there is none.
    FileFormatError
        If it is damaged, or not that of LoRA.
    """
    path = input_file(folder / _FILE_NAME)
    try:
        config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: expected the configuration of a LoRA adapter, got {error}; copy the "
            "folder as it was saved"
        ) from error
    check_instance(str(path), config, LoraConfig, "that of a LoRA adapter", error=FileFormatError)
    return config
