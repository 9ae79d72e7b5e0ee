"""Metadata of an initialized adapter: in the model, and in a JSON file beside PEFT's files."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ipa_core.errors import FileFormatError
from ipa_core.io.atomic_write import replace_file
from ipa_core.io.paths import as_path
from ipa_core.settings import boolean, check_instance, integer, number
from ipa_hf.layer_names import layer_name
from ipa_hf.lora_layers import lora_layers
from ipa_torch.extension import Scaling, check_scaling, in_float64

FILE_NAME = "ipa_adapter.json"
_FORMAT, _VERSION = "ipa-adapter", 2
#: Difference of sums of A beyond rounding to bfloat16, relative to the norm of A.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class LayerMetadata:
    """Initialization of one layer: A = scale * P, where P captured a share of the energy."""

    rank: int
    scale: float
    captured: float
    samples: int

    def __post_init__(self) -> None:
        integer("rank", self.rank, least=1)
        integer("samples", self.samples, least=0)
        check_instance("scale", self.scale, float, "a float")
        number("scale", self.scale, form="finite", valid=math.isfinite)  # as alpha, below 0 or not
        check_instance("captured", self.captured, float, "a float")
        form = "finite and at least 0"
        number("captured", self.captured, form=form, valid=lambda x: 0 <= x < math.inf)


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
        path = as_path(directory) / FILE_NAME
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
            check_scaling(content["scaling"])
            frozen = boolean("frozen", content["frozen"])
            return cls(frozen, content["scaling"], layers, row_weights)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"{path}: expected adapter metadata, got {error}") from error


def row_weights_name(row_weights: Callable[..., Any] | None) -> str:
    """Return the name of row weights for the metadata."""
    if row_weights is None:
        return "all rows"
    return str(getattr(row_weights, "__name__", type(row_weights).__name__))


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


@dataclass(frozen=True)
class _Entry:
    """Metadata of the slots of a layer, and the sum over its A when it was attached."""

    metadata: AdapterMetadata
    total: float | None

    def describes(self, weight: torch.Tensor) -> bool:
        """Return whether a frozen A is still that of the metadata: PEFT's hotswap replaces it."""
        total = _sum(weight)
        if not self.metadata.frozen or self.total is None or total is None:
            return True
        return abs(total - self.total) <= _TOLERANCE * float(weight.float().norm())


def attach_metadata(model: torch.nn.Module, adapter_name: str, metadata: AdapterMetadata) -> None:
    """Attach the metadata of an adapter to its layers.

    Each A carries the metadata of its own layer: another adapter under the same configuration has
    none, and none is left when the adapter is deleted.
    """
    for name, layer in lora_layers(model, adapter_name).items():
        slots = {slot: x for slot, x in metadata.layers.items() if layer_name(slot) == name}
        if slots:
            a: Any = layer.lora_A[adapter_name]
            a.ipa_metadata = _Entry(replace(metadata, layers=slots), _sum(a.weight))


def find_metadata(model: torch.nn.Module, adapter_name: str = "default") -> AdapterMetadata | None:
    """Return the metadata of an adapter; None if it has none, or if its frozen A was replaced."""
    entries: list[_Entry] = []
    for layer in lora_layers(model, adapter_name).values():
        a: Any = layer.lora_A[adapter_name] if adapter_name in layer.lora_A else None
        entry: _Entry | None = getattr(a, "ipa_metadata", None)
        if entry is not None and not entry.describes(a.weight):
            return None
        entries += [entry] if entry is not None else []
    if not entries:
        return None
    slots = {slot: x for entry in entries for slot, x in entry.metadata.layers.items()}
    return replace(entries[0].metadata, layers=slots)


def write_metadata(model: torch.nn.Module, adapter_name: str, folder: Path) -> None:
    """Write the metadata of an adapter into its directory, or remove that of another adapter."""
    metadata = find_metadata(model, adapter_name)
    if metadata is None:
        (folder / FILE_NAME).unlink(missing_ok=True)
    else:
        metadata.write(folder)


def _sum(weight: torch.Tensor) -> float | None:
    """Return the sum of a matrix in this process; None of sharded and of offloaded ones."""
    whole = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.ndim == 2
    return float(in_float64(weight.detach()).sum()) if whole and not weight.is_meta else None
