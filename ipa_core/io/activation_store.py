"""On-disk activation dataset of many layers: half-precision shards and an index."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from safetensors import SafetensorError
from safetensors.numpy import load as load_numpy

from ipa_core import settings
from ipa_core._array import Array
from ipa_core.caller_warnings import warn_caller
from ipa_core.errors import FileFormatError
from ipa_core.io.paths import as_path
from ipa_core.io.store_index import Index, Shard
from ipa_core.optional_dependencies import import_optional

OnDamaged: TypeAlias = Literal["raise", "skip"]


class ActivationStore(Mapping[str, "StoredLayer"]):
    """Activations on disk by layer, written by `ipa_torch.store_activations`.

    Parameters
    ----------
    folder : path-like
        Folder of the store.
    on_damaged : {"raise", "skip"}, default "raise"
        Treatment of a missing or damaged shard: raise, or skip it with a warning. Both name the
        shard; a damaged shard is never read as activations.

    Raises
    ------
    FileFormatError
        If the index is damaged.
    MissingFileError
        If there is no index.

    Examples
    --------
    Of a folder that `ipa_torch.store_activations` has written:

    >>> from ipa_core import ActivationStore, fit_projector
    >>> store = ActivationStore("activations")  # doctest: +SKIP
    >>> fit_projector(store["model.layers.0.mlp.up_proj"], rank=8)  # doctest: +SKIP
    """

    def __init__(self, folder: str | os.PathLike[str], *, on_damaged: OnDamaged = "raise") -> None:
        settings.choice("on_damaged", on_damaged, ("raise", "skip"))
        self.folder = as_path(folder)
        self.on_damaged = on_damaged
        self.index = Index.read(self.folder)

    def __getitem__(self, name: str) -> StoredLayer:
        return StoredLayer(self, name, self.index.layers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.index.layers)

    def __len__(self) -> int:
        return len(self.index.layers)

    def __repr__(self) -> str:
        rows = sorted({layer.samples for layer in self.values()}) or [0]
        listed = f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"
        return (
            f"ActivationStore({len(self)} layers, {listed} rows a layer, {self.index.dtype}, "
            f"{self.bytes:,} bytes)"
        )

    @property
    def bytes(self) -> int:
        """Bytes of all shards; a shard that layers share counts once."""
        shards = {
            shard.file: shard.bytes for layer in self.index.layers.values() for shard in layer
        }
        return sum(shards.values())

    def damaged(self) -> dict[str, str]:
        """Read all shards; return the missing and damaged files with their errors."""
        errors = {}
        for shard in {shard for layer in self.index.layers.values() for shard in layer}:
            try:
                self.read(shard)
            except FileFormatError as error:
                errors[shard.file] = str(error)
        return dict(sorted(errors.items()))

    def read(self, shard: Shard) -> tuple[Array, Array | None]:
        """Return rows and weights of a shard.

        Raises
        ------
        FileFormatError
            If the shard is missing or damaged.
        """
        path = self.folder / shard.file
        try:
            # The size first: a file that has grown is not read.
            data = path.read_bytes() if path.stat().st_size == shard.bytes else b""
        except OSError as error:
            raise FileFormatError(f"{path}: expected a shard, got {error.strerror}") from error
        if _digest(data) != shard.sha256:
            raise FileFormatError(
                f"{path}: expected {shard.bytes:,} bytes that match the index's digest, got a "
                "damaged shard; write the store again, or open it with on_damaged='skip'"
            )
        return _decoded(data, self.index.dtype, path)


@dataclass(frozen=True)
class StoredLayer:
    """Activations of a layer: a stream that can be read repeatedly.

    Memory: one shard at a time.
    """

    store: ActivationStore
    name: str
    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        """Number of rows."""
        return sum(shard.rows for shard in self.shards)

    def parts(self) -> list[StoredLayer]:
        """Return one stream for each shard, small enough to be sent to a worker."""
        parts = []
        for shard in self.shards:
            store = copy.copy(self.store)
            store.index = replace(store.index, layers={self.name: (shard,)}, writer_state={})
            parts.append(StoredLayer(store, self.name, (shard,)))
        return parts

    def __iter__(self) -> Iterator[tuple[Array, Array] | Array]:
        for _, rows, weights in self.labeled_batches():
            yield rows if weights is None else (rows, weights)

    def labeled_batches(self) -> Iterator[tuple[str, Array, Array | None]]:
        """Yield the path, rows and weights of each shard."""
        for shard in self.shards:
            try:
                rows, weights = self.store.read(shard)
            except FileFormatError as error:
                if self.store.on_damaged == "raise":
                    raise
                warn_caller(f"skipped {shard.rows:,} rows of {self.name!r}: {error}")
                continue
            yield str(self.store.folder / shard.file), rows, weights


def _decoded(data: bytes, dtype: str, path: Path) -> tuple[Array, Array | None]:
    try:
        if dtype == "float16":
            tensors = load_numpy(data)
        else:
            import_optional("torch", extra="torch", user=f"{path}, in bfloat16,")
            from safetensors.torch import load as load_torch

            tensors = {key: value.float().numpy() for key, value in load_torch(data).items()}
        return tensors["rows"], tensors.get("weights")
    except (SafetensorError, KeyError) as error:
        raise FileFormatError(f"{path}: expected a shard of rows, got {error}") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
