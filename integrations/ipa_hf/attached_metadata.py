"""Metadata of the adapters in a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ipa_hf.layer_names import layer_name
from ipa_hf.lora_layers import lora_layers
from ipa_hf.metadata_file import FILE_NAME, AdapterMetadata
from ipa_torch.extension import in_float64

#: Difference of sums of A beyond rounding to bfloat16, relative to the norm of A.
_TOLERANCE = 0.02


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
