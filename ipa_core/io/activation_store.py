"""Stored activations of many layers: shards of half precision, and an index of what they hold."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from safetensors import SafetensorError
from safetensors.numpy import load as load_numpy

from ipa_core._array import Array
from ipa_core.errors import FileFormatError, MissingDependencyError, SettingError
from ipa_core.io.serialization import replace_file

FORMAT_VERSION = 1
INDEX = "index.json"
OnDamaged: TypeAlias = Literal["raise", "skip"]


@dataclass(frozen=True)
class Shard:
    """A file of rows: ``rows`` (n, features), and ``weights`` (n,) unless all are one.

    Parameters
    ----------
    file : str
        Its name in the folder of the store.
    rows, bytes : int
        What it holds.
    sha256 : str
        Digest of the file.
    """

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What a store holds.

    Parameters
    ----------
    layers : mapping of str to tuple of Shard
        In the order in which they were written. Layers that saw the same inputs have the same.
    dtype : str
        "float16" or "bfloat16".
    batches : int
        Batches that the model was run on.
    ended : str or None
        Why writing ended; None while it goes on, or was interrupted.
    writer : mapping
        What the writer needs to go on.
    """

    layers: Mapping[str, tuple[Shard, ...]]
    dtype: str
    batches: int
    ended: str | None
    writer: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write the index, whole or not at all."""
        shards = {shard.file: shard for own in self.layers.values() for shard in own}
        content = {
            "layers": {name: [shard.file for shard in own] for name, own in self.layers.items()},
            "shards": {file: vars(shard) for file, shard in shards.items()},
            "dtype": self.dtype,
            "batches": self.batches,
            "ended": self.ended,
            "writer": dict(self.writer),
        }
        text = json.dumps(content)
        whole = {
            "format": "ipa-activations",
            "format_version": FORMAT_VERSION,
            "sha256": _digest(text.encode()),
            "content": text,
        }
        replace_file(folder / INDEX, json.dumps(whole).encode())

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read the index of a store.

        Raises
        ------
        FileFormatError
            If it is damaged, of another kind, or was written by a newer version.
        FileNotFoundError
            If there is none.
        """
        path = folder / INDEX
        try:
            whole = json.loads(path.read_bytes())
            kind, version = whole["format"], whole["format_version"]
            text = whole["content"]
            if kind != "ipa-activations" or version != FORMAT_VERSION:
                raise FileFormatError(
                    f"{path}: expected format 'ipa-activations' of version {FORMAT_VERSION}, got "
                    f"{kind!r} of {version!r}; update ipa-projectors"
                )
            if whole["sha256"] != _digest(text.encode()):
                raise ValueError("contents that do not fit their digest")
            content = json.loads(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(
                f"{path}: expected the index of a store of activations, got {error}"
            ) from error
        shards = {file: Shard(**entry) for file, entry in content["shards"].items()}
        named = content.pop("layers").items()
        layers = {name: tuple(shards[file] for file in own) for name, own in named}
        del content["shards"]
        return cls(layers=layers, **content)


class ActivationStore(Mapping[str, "StoredLayer"]):
    """Activations on disk, by layer, as `ipa_torch.store_activations` wrote them.

    Parameters
    ----------
    folder : path-like
        The store.
    on_damaged : {"raise", "skip"}, default "raise"
        What to do about a shard that is missing or not what was written: refuse it, or leave it out
        with a warning. Both name it. None is ever read as activations.

    Raises
    ------
    FileFormatError
        If the index is damaged.
    FileNotFoundError
        If there is none.

    Examples
    --------
    >>> import tempfile, torch
    >>> from ipa_core import ActivationStore, fit_projector
    >>> from ipa_torch import store_activations
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 2))
    >>> batches = [torch.randn(32, 16) for _ in range(4)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = store_activations(model, batches, folder, progress=False)
    ...     store
    ...     fit_projector(store["0"], rank=2).samples
    ActivationStore(2 layers, 128 rows a layer, float16, 6,296 bytes)
    128
    """

    def __init__(self, folder: str | os.PathLike[str], *, on_damaged: OnDamaged = "raise") -> None:
        if on_damaged not in ("raise", "skip"):
            raise SettingError(f"expected on_damaged to be 'raise' or 'skip', got {on_damaged!r}")
        self.folder = Path(folder)
        self.on_damaged = on_damaged
        self.index = Index.read(self.folder)

    def __getitem__(self, name: str) -> StoredLayer:
        return StoredLayer(self, name, self.index.layers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.index.layers)

    def __len__(self) -> int:
        return len(self.index.layers)

    def __repr__(self) -> str:
        rows = sorted({layer.samples for layer in self.values()})
        listed = f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"
        return (
            f"ActivationStore({len(self)} layers, {listed} rows a layer, {self.index.dtype}, "
            f"{self.bytes:,} bytes)"
        )

    @property
    def bytes(self) -> int:
        """Bytes of all shards, those that layers share once."""
        shards = {shard.file: shard.bytes for own in self.index.layers.values() for shard in own}
        return sum(shards.values())

    def damaged(self) -> dict[str, str]:
        """Read all shards; return those that are missing or damaged, and what is wrong."""
        found = {}
        for shard in {shard for own in self.index.layers.values() for shard in own}:
            try:
                self.read(shard)
            except FileFormatError as error:
                found[shard.file] = str(error)
        return dict(sorted(found.items()))

    def read(self, shard: Shard) -> tuple[Array, Array | None]:
        """Return rows and weights of a shard.

        Raises
        ------
        FileFormatError
            If it is missing or not what was written.
        """
        path = self.folder / shard.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FileFormatError(f"{path}: expected a shard, got {error.strerror}") from error
        if _digest(data) != shard.sha256:
            raise FileFormatError(
                f"{path}: expected the {shard.bytes:,} bytes that were written, got others; the "
                "shard is damaged: write it anew, or open the store with on_damaged='skip'"
            )
        return _decoded(data, self.index.dtype, path)


@dataclass(frozen=True)
class StoredLayer:
    """The activations of one layer: a stream that can be read again and again.

    Memory: one shard at a time.
    """

    store: ActivationStore
    name: str
    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        """Number of its rows."""
        return sum(shard.rows for shard in self.shards)

    def parts(self) -> list[StoredLayer]:
        """Return one stream for each shard, light enough to be sent to where it is read."""
        parts = []
        for shard in self.shards:
            own = copy.copy(self.store)
            own.index = replace(own.index, layers={self.name: (shard,)}, writer={})
            parts.append(StoredLayer(own, self.name, (shard,)))
        return parts

    def __iter__(self) -> Iterator[tuple[Array, Array] | Array]:
        for shard in self.shards:
            try:
                rows, weights = self.store.read(shard)
            except FileFormatError as error:
                if self.store.on_damaged == "raise":
                    raise
                warnings.warn(
                    f"left out {shard.rows:,} rows of {self.name!r}: {error}", stacklevel=2
                )
                continue
            yield rows if weights is None else (rows, weights)


def _decoded(data: bytes, dtype: str, path: Path) -> tuple[Array, Array | None]:
    try:
        if dtype == "float16":
            tensors = load_numpy(data)
        elif find_spec("torch") is None:
            raise MissingDependencyError(
                f"{path}: expected torch to be installed, which reads bfloat16; "
                "run pip install 'ipa-projectors[torch]'"
            )
        else:
            from safetensors.torch import load as load_torch

            tensors = {key: value.float().numpy() for key, value in load_torch(data).items()}
        return tensors["rows"], tensors.get("weights")
    except (SafetensorError, KeyError) as error:
        raise FileFormatError(f"{path}: expected a shard of rows, got {error}") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
