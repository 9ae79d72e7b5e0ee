"""Metadata of an initialized adapter, in a JSON file beside PEFT's files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ipa_core.errors import FileFormatError
from ipa_core.io.atomic_write import replace_file
from ipa_torch.extension import Scaling

FILE_NAME = "ipa_adapter.json"
_FORMAT, _VERSION = "ipa-adapter", 2


@dataclass(frozen=True)
class LayerMetadata:
    """Initialization of one layer: A = scale * P, where P captured a share of the energy."""

    rank: int
    scale: float
    captured: float
    samples: int


@dataclass(frozen=True)
class AdapterMetadata:
    """Initialization of an adapter, layer by layer.

    Parameters
    ----------
    frozen : bool
        Whether A is excluded from training.
    scaling : "energy" or float
        The setting that the scales follow from.
    layers : mapping of str to LayerMetadata
        By the layers' names in the base model.
    row_weights : str or None, default None
        Name of the function that weighted the rows of the fit, "all rows" without one; None if it
        is not known, as with fitted projectors.
    """

    frozen: bool
    scaling: Scaling
    layers: Mapping[str, LayerMetadata]
    row_weights: str | None = None

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Write the metadata file into an adapter directory, atomically."""
        content = {"format": _FORMAT, "format_version": _VERSION, **asdict(self)}
        content["sha256"] = _digest(content)
        text = json.dumps(content, indent=2) + "\n"
        replace_file(Path(directory) / FILE_NAME, text.encode())

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> AdapterMetadata:
        """Read the metadata file of an adapter directory.

        Raises
        ------
        FileFormatError
            If the file is missing, damaged or of another format version.
        """
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise FileFormatError(
                f"expected {FILE_NAME} in {directory}, got no such file; load an adapter without "
                "it with peft.PeftModel.from_pretrained, and freeze its A with "
                "ipa_hf.freeze_projections"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            _check_version(path, content["format"], content["format_version"])
            if content.pop("sha256") != _digest(content):
                raise FileFormatError(
                    f"{path}: expected contents that match the digest, got others; restore the "
                    "file, or initialize the adapter again"
                )
            layers = {name: LayerMetadata(**layer) for name, layer in content["layers"].items()}
            row_weights = content.get("row_weights")  # absent in earlier files
            return cls(bool(content["frozen"]), content["scaling"], layers, row_weights)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"{path}: expected adapter metadata, got {error}") from error


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_version(path: Path, name: Any, version: Any) -> None:
    if (name, version) == (_FORMAT, _VERSION):
        return
    newer = isinstance(version, int) and version > _VERSION
    cure = "update ipa-projectors" if newer else "initialize the adapter again"
    raise FileFormatError(
        f"{path}: expected format {_FORMAT!r} version {_VERSION}, got {name!r} version "
        f"{version!r}; {cure}"
    )
