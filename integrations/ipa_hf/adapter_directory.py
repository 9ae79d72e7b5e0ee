"""Adapter directory that a command writes: checked before the fit, and written as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ipa_core.errors import PathError
from ipa_core.io.atomic_write import check_writable
from ipa_core.io.paths import output_folder, output_folder_path
from ipa_hf.adapter_metadata import FILE_NAME

_CARD = "README.md"
_FILES = ("adapter_model.safetensors", "adapter_config.json", _CARD, FILE_NAME)


def check_output(path: Path, inputs: Iterable[Path]) -> Path:
    """Return the directory to which an adapter can be written; it is not created yet.

    Raises
    ------
    PathError
        If it is no directory or new name, one of the inputs, or cannot be written to.
    """
    folder = output_folder_path(path)
    is_input = folder.is_dir() and any(x.is_dir() and x.samefile(folder) for x in inputs)
    if is_input or not folder.name:
        raise PathError(
            f"{path}: expected another directory than the root folder, the model and the data; "
            "choose a new name"
        )
    if folder.is_dir():
        for name in _FILES:
            check_writable(folder / name)
    else:
        output_folder(folder.parent)
        check_writable(folder)
    return folder


def save_adapter(peft_model: Any, folder: Path) -> None:
    """Write an adapter as ``save_pretrained`` does; on errors the directory stays as it was.

    Raises
    ------
    PathError
        If it cannot be written.
    """
    name = os.fsdecode(os.fsencode(folder.name)[:200])
    # Within a directory that is there: it may be a volume of its own.
    scratch = folder / ".writing" if folder.is_dir() else folder.with_name(f".{name}.writing")
    try:
        if scratch.exists():  # after a kill
            shutil.rmtree(scratch)
        scratch.mkdir()
        if (folder / _CARD).is_file():  # PEFT adds to it
            shutil.copyfile(folder / _CARD, scratch / _CARD)
        peft_model.save_pretrained(str(scratch))
        if folder.exists():
            _replace_files(scratch, folder)
        else:
            os.replace(scratch, folder)
    except (OSError, SafetensorError) as error:
        raise PathError(
            f"{folder}: expected to write the adapter, got {error}; give another --out, or free "
            "space and run the same command again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace_files(scratch: Path, folder: Path) -> None:
    """Move files into a folder; after an error it has its old files again."""
    names = sorted(path.name for path in scratch.iterdir())
    old = scratch / "old"
    old.mkdir()
    for name in names:
        if (folder / name).exists():
            shutil.copy2(folder / name, old)
    try:
        for name in names:
            os.replace(scratch / name, folder / name)
    except BaseException:
        for name in names:
            if (old / name).exists():
                os.replace(old / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise
