"""Writer of activation stores: the inputs of layers on disk, for several fits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import save as to_bytes
from torch import nn
from tqdm.auto import tqdm

from ipa_core import ActivationStore
from ipa_core.caller_warnings import warn_caller
from ipa_core.errors import EmptyStreamError, SettingError
from ipa_core.io.atomic_write import replace_file
from ipa_core.io.paths import as_path
from ipa_core.io.store_index import INDEX, Index, Shard
from ipa_core.settings import boolean, number
from ipa_torch._capture.activation_rows import ActivationRows
from ipa_torch._capture.attention_mask import attention_mask
from ipa_torch._capture.eval_mode import eval_mode
from ipa_torch._capture.forward import Forward, check_batches, resolve_forward
from ipa_torch._capture.row_weights import RowWeights
from ipa_torch._fit.code_digest import code_digest
from ipa_torch._fit.collector import ActivationCollector
from ipa_torch._fit.early_stopping import DATA_EXHAUSTED, NO_BATCH
from ipa_torch._fit.folder_lock import lock_folder
from ipa_torch._fit.resumable_pass import ResumablePass
from ipa_torch._fit.row_buffer import RowBuffer
from ipa_torch._fit.shared_inputs import InputPrefix, SharedInputTree
from ipa_torch._fit.weight_digests import WeightDigests
from ipa_torch._layers.targets import ALL_LINEAR, Targets, select_layers
from ipa_torch._layers.unwrap import unwrap_model
from ipa_torch._settings import check_choice, check_positive, resolve_max_patches
from ipa_torch.errors import LayerError

Half: TypeAlias = Literal["float16", "bfloat16"]
# Largest size of a shard's header.
_HEADER = 512


def store_activations(
    model: nn.Module,
    batches: Iterable[Any],
    folder: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
    dtype: Half = "float16",
    targets: Targets = ALL_LINEAR,
    row_weights: RowWeights | None = attention_mask,
    forward: Forward | None = None,
    max_patches: int | None = 8192,
    shard_bytes: int = 256 << 20,
    progress: bool = True,
) -> ActivationStore:
    """Write the input activations of a model's layers to disk, for any number of fits.

    Rows are selected as by `fit_projectors`; layers that are given the same tensor share files. An
    interrupted store, also after a kill, resumes from its index: the batches that it has are read,
    compared and skipped. A finished store is returned, if it is of these batches and weights.

    Parameters
    ----------
    model, batches, targets, row_weights, forward, max_patches, progress
        As for `fit_projectors`.
    folder : path-like
        Folder of the store, created if missing. In a distributed run each rank needs its own.
    max_bytes : int, optional
        Largest size of all shards. Writing ends before the batch that would exceed it.
    dtype : {"float16", "bfloat16"}, default "float16"
        Precision of the rows: 11 bits up to 65,504, or 8 bits in the range of float32.
    shard_bytes : int, default 256 MiB
        Size of the buffer of all layers' rows; a full buffer is written to a shard for each
        distinct input. A kill loses the buffer.

    Returns
    -------
    ActivationStore
        From layer names to streams for `ipa_core.fit_projector`.

    Raises
    ------
    SettingError
        If the budget is too small for a batch, the folder has a store with other settings or of
        other weights, or another run writes to it.
    NonFiniteError
        If a value is beyond the range of ``dtype``; the message names the layer.
    StreamError
        If the batches differ from those that the store has.
    FileFormatError
        If the index is damaged.
    PathError
        If the folder cannot be made.
    LayerError
        If ``targets`` match no layer that runs.

    Notes
    -----
    Cost for n rows of d features of each distinct input: 2 n d bytes.

    Examples
    --------
    >>> import tempfile, torch
    >>> from ipa_core import fit_projector
    >>> from ipa_torch import store_activations
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 2))
    >>> batches = [torch.randn(32, 16) for _ in range(4)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = store_activations(model, batches, folder, progress=False)
    ...     [fit_projector(store["1"], rank).rank for rank in (2, 4)]
    [2, 4]
    """
    check_choice("dtype", dtype, Half)
    check_positive("max_bytes", max_bytes)
    number("shard_bytes", shard_bytes, form="above 0", valid=lambda size: size > 0)
    check_batches(batches)
    max_patches = resolve_max_patches(max_patches)
    folder = as_path(folder)
    model = unwrap_model(model)
    layers = select_layers(model, targets)
    half = torch.float16 if dtype == "float16" else torch.bfloat16
    inputs = SharedInputTree(dict.fromkeys(layers, 1), lambda _: RowBuffer(half), None)
    collector = ActivationCollector(
        layers,
        inputs,
        ActivationRows(model, row_weights, max_patches),
        max_rows=None,
        drop_failed=False,
    )
    settings = {
        "dtype": dtype,
        "layers": [*layers],
        "max_patches": max_patches,
        "row_weights": code_digest(row_weights),
        "forward": code_digest(forward),
    }
    position = ResumablePass(settings, WeightDigests(model, layers.values()))
    run = resolve_forward(forward)
    disable = None if boolean("progress", progress) else True
    bar = tqdm(desc="storing", unit=" rows", unit_scale=True, disable=disable)
    with lock_folder(folder):
        writer = _Writer(folder, inputs, dtype, position, max_bytes, shard_bytes)
        with eval_mode(model), collector, bar:
            for batch in writer.skip_seen(batches):
                before = dict(inputs.node_of)
                with position.first_batch(), collector.batch(batch):
                    run(model, batch)
                bar.update(collector.rows)
                if not writer.record_batch(batch, before):
                    break
            writer.end()
    _report_missing(layers, writer.index)
    return ActivationStore(folder)


class _Writer:
    """Writer of the buffered rows in shards; the index lists complete shards only."""

    def __init__(
        self,
        folder: Path,
        inputs: SharedInputTree[RowBuffer],
        dtype: Half,
        position: ResumablePass,
        max_bytes: int | None,
        shard_bytes: int,
    ) -> None:
        self._folder = folder
        self._inputs = inputs
        self._fresh = dict(inputs.node_of)
        self._position = position
        self._max_bytes = max_bytes
        self._shard_bytes = shard_bytes
        self._reason = DATA_EXHAUSTED
        if (folder / INDEX).exists():
            self.index = Index.read(folder)
            position.check(self.index.writer_state, folder)
        else:
            self.index = Index({}, dtype, 0, None, {**position.state(), "files": 0})
        sizes = {
            shard.file: shard.bytes for shards in self.index.layers.values() for shard in shards
        }
        self._bytes_written = sum(sizes.values())

    def skip_seen(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Return the batches that the store does not have yet; none if it is finished."""
        remaining = iter(batches)
        for kind in (".index.json.*", ".*.safetensors.*"):
            for unfinished in self._folder.glob(kind):
                unfinished.unlink()
        if self.index.batches:
            self._position.skip(remaining, self.index.writer_state, self._folder)
        return remaining if self.index.ended is None else iter(())

    def record_batch(self, batch: Any, before: Mapping[str, InputPrefix[RowBuffer]]) -> bool:
        """Count a batch; return whether there is room for more."""
        pending = [node.learner.bytes + _HEADER for node in self._nodes()]
        if self._max_bytes is not None and self._bytes_written + sum(pending) > self._max_bytes:
            self._inputs.node_of.update(before)
            self._reason = f"max_bytes of {self._max_bytes:,} reached"
            if not self._position.seen:
                raise SettingError(
                    f"expected max_bytes of at least {sum(pending):,}, which the first batch "
                    f"takes, got {self._max_bytes:,}; allow more, or store fewer layers"
                )
            return False
        self._position.record_batch(batch)
        if sum(pending) >= self._shard_bytes:
            self._flush(None)
        return True

    def end(self) -> None:
        """Write the remaining rows, and the reason of the end, unless the store is finished."""
        if not self._position.seen:
            raise EmptyStreamError(NO_BATCH)
        if self.index.ended is None:
            self._flush(self._reason)

    def _nodes(self) -> list[InputPrefix[RowBuffer]]:
        nodes = {id(node): node for node in self._inputs.node_of.values() if node.learner.samples}
        return list(nodes.values())

    def _flush(self, ended: str | None) -> None:
        layers = {name: list(shards) for name, shards in self.index.layers.items()}
        number = self.index.writer_state["files"]
        written: dict[int, Shard] = {}
        for node in self._nodes():
            data: bytes = to_bytes(node.learner.tensors())
            file = f"{number:08d}.safetensors"
            replace_file(self._folder / file, data)
            digest = hashlib.sha256(data).hexdigest()
            written[id(node)] = Shard(file, node.learner.samples, len(data), digest)
            self._bytes_written += len(data)
            number += 1
        for name, node in self._inputs.node_of.items():
            if id(node) in written:
                layers.setdefault(name, []).append(written[id(node)])
        order = [name for name in self._fresh if name in layers]
        self.index = Index(
            {name: tuple(layers[name]) for name in order},
            self.index.dtype,
            self._position.seen,
            ended,
            {**self._position.state(), "files": number},
        )
        self.index.write(self._folder)
        self._inputs.node_of.update(self._fresh)


def _report_missing(layers: Mapping[str, nn.Module], index: Index) -> None:
    missing = [name for name in layers if name not in index.layers]
    if len(missing) == len(layers):
        raise LayerError("expected rows of at least one layer, got none; no target layer ran")
    if missing:
        warn_caller(
            f"expected rows of every layer, got none of {', '.join(map(repr, missing))}; "
            "leave them out of the targets, or feed batches that reach them",
        )
