"""Index of an activation store, and its shards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipa_core.errors import FileFormatError
from ipa_core.io.atomic_write import replace_file
from ipa_core.io.file_header import FileFormat, reading
from ipa_core.io.paths import read_file
from ipa_core.settings import integer

_FORMAT = FileFormat("ipa-activations", 3)
INDEX = "index.json"
#: Names of shards: plain file names, which cannot leave the folder.
_FILE = re.compile(r"\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Shard:
    """File of ``rows`` (n, features), and of ``weights`` (n,) unless all are 1.

    Parameters
    ----------
    file : str
        File name in the folder of the store.
    rows, bytes : int
        Number of rows, and size of the file.
    sha256 : str
        Digest of the file.
    """

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """Index of a store: the shards of each layer, and the state of the writer.

    Parameters
    ----------
    layers : mapping of str to tuple of Shard
        In the order of writing. Layers with equal inputs share their shards.
    dtype : str
        "float16" or "bfloat16".
    batches : int
        Batches that the model was run on.
    ended : str or None
        Reason for which writing ended; None while it continues, or after an interruption.
    writer_state : mapping
        State from which an interrupted writer resumes.
    """

    layers: Mapping[str, tuple[Shard, ...]]
    dtype: str
    batches: int
    ended: str | None
    writer_state: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write the index atomically."""
        shards = {shard.file: shard for layer in self.layers.values() for shard in layer}
        content = {
            "layers": {
                name: [shard.file for shard in layer] for name, layer in self.layers.items()
            },
            "shards": {file: vars(shard) for file, shard in shards.items()},
            "dtype": self.dtype,
            "batches": self.batches,
            "ended": self.ended,
            "writer_state": dict(self.writer_state),
        }
        replace_file(folder / INDEX, json.dumps(_FORMAT.seal(content)).encode())

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read the index of a store.

        Raises
        ------
        FileFormatError
            If the index is damaged, or of another format or version.
        MissingFileError
            If there is no index.
        """
        path = folder / INDEX
        data = read_file(path)
        with reading(path, "the index of an activation store"):
            return cls._of(_FORMAT.unseal(json.loads(data), path))

    @classmethod
    def _of(cls, content: dict[str, Any]) -> Index:
        shards = {file: Shard(**entry) for file, entry in content["shards"].items()}
        for shard in shards.values():
            if not _FILE.fullmatch(shard.file):
                raise ValueError(
                    f"a shard {shard.file!r}, which is no name of a file in its folder"
                )
            if not isinstance(shard.sha256, str):
                raise ValueError(f"{shard.sha256!r} as the digest of {shard.file}")
            for number in (shard.rows, shard.bytes):
                integer("rows and bytes of a shard", number, least=0, error=FileFormatError)
        named = content.pop("layers").items()
        layers = {name: tuple(shards[file] for file in files) for name, files in named}
        del content["shards"]
        index = cls(layers=layers, **content)
        integer("batches", index.batches, least=0, error=FileFormatError)
        if index.dtype not in ("float16", "bfloat16") or not isinstance(index.ended, str | None):
            raise ValueError(f"dtype {index.dtype!r}, ended {index.ended!r}")
        return index
