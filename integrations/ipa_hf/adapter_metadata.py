"""What PEFT's files do not say about an adapter: a side file, written wherever PEFT saves it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel

from ipa_core.errors import FileFormatError
from ipa_hf.scaling import Scaling

FILE_NAME = "ipa_adapter.json"
_FORMAT, _VERSION = "ipa-adapter", 1


@dataclass(frozen=True)
class LayerRecord:
    """How one layer's A began: s P, with the share of its input's energy that P captured."""

    rank: int
    factor: float
    captured: float
    samples: int


@dataclass(frozen=True)
class AdapterRecord:
    """Where an adapter's projections come from, and whether they are held fixed.

    Parameters
    ----------
    frozen : bool
        Whether A stays as it was learned.
    scaling : "energy" or float
        The rule of the factors.
    layers : mapping of str to LayerRecord
        By the layers' names in the base model.
    """

    frozen: bool
    scaling: Scaling
    layers: Mapping[str, LayerRecord]

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Write the side file into an adapter directory."""
        content = {"format": _FORMAT, "format_version": _VERSION, **asdict(self)}
        text = json.dumps(content, indent=2)
        (Path(directory) / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> AdapterRecord:
        """Read the side file of an adapter directory.

        Raises
        ------
        FileFormatError
            If there is none, or it is damaged or of a newer version.
        """
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise FileFormatError(
                f"expected {FILE_NAME} in {directory}, got no such file; an adapter that was not "
                "saved with its record loads with peft.PeftModel.from_pretrained, and "
                "ipa_hf.freeze_projections holds its A fixed"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if (content["format"], content["format_version"]) != (_FORMAT, _VERSION):
                raise FileFormatError(
                    f"{path}: expected format {_FORMAT!r} version {_VERSION}, got "
                    f"{content['format']!r} version {content['format_version']!r}; "
                    "update ipa-projectors"
                )
            layers = {name: LayerRecord(**layer) for name, layer in content["layers"].items()}
            return cls(bool(content["frozen"]), content["scaling"], layers)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"{path}: expected an adapter's record, got {error}") from error


class RecordingLoraConfig(LoraConfig):
    """A `LoraConfig` that leaves the record beside every file that PEFT writes of it.

    It has no field of its own, so that ``adapter_config.json`` is the plain one.
    """

    record: Any = None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration as PEFT does, and the record into the same directory."""
        super().save_pretrained(save_directory, **kwargs)
        self.record.write(save_directory)


def attach_metadata(peft_model: PeftModel, adapter_name: str, record: AdapterRecord) -> None:
    """Let `save_pretrained` of the model write the adapter's record too."""
    config = RecordingLoraConfig.__new__(RecordingLoraConfig)
    # Not rebuilt from its fields: PEFT keeps more in a configuration than they hold.
    config.__dict__ = copy.copy(peft_model.peft_config[adapter_name].__dict__)
    config.record = record
    peft_model.peft_config[adapter_name] = config
