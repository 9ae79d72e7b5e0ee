"""Writing the inputs of layers to disk, so that several things can be learned from one pass."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, cast

import torch
from safetensors.torch import save as to_bytes
from torch import nn
from tqdm.auto import tqdm

from ipa_core import ActivationStore, Learner
from ipa_core.errors import EmptyStreamError, NonFiniteError, SettingError
from ipa_core.io.activation_store import INDEX, Index, Shard
from ipa_core.io.serialization import replace_file
from ipa_torch._capture.eval_mode import eval_mode
from ipa_torch._capture.forward import Forward, default_forward
from ipa_torch._capture.row_weights import RowWeighter, RowWeights, attention_mask
from ipa_torch._fit.batch_digest import chained
from ipa_torch._fit.checkpoint import skip
from ipa_torch._fit.collector import ActivationCollector
from ipa_torch._fit.early_stopping import DATA_EXHAUSTED
from ipa_torch._fit.row_consumer import Deferred
from ipa_torch._fit.shared_inputs import SharedInputTree
from ipa_torch._layers.targets import ALL_LINEAR, Targets, select_layers
from ipa_torch._layers.unwrap import unwrap_model
from ipa_torch.errors import LayerError, check_choice

Half: TypeAlias = Literal["float16", "bfloat16"]
# What the header of a shard takes, at most.
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
    """Write what layers of a model are given to disk, to learn from it as often as one likes.

    Rows are chosen as `fit_projectors` chooses them; layers that are given the same tensor share
    what is written. A store that was interrupted, by a kill too, goes on where its index stands:
    the batches it holds are drawn again, compared, and not run. A finished one is returned.

    Parameters
    ----------
    model, batches, targets, row_weights, forward, max_patches, progress
        As for `fit_projectors`.
    folder : path-like
        Made if it is not there; one store. In a distributed run each process needs its own.
    max_bytes : int, optional
        The most that all shards may take. Writing ends before the batch that would exceed it.
    dtype : {"float16", "bfloat16"}, default "float16"
        What rows are rounded to: 11 bits of precision up to 65,504, or 8 bits with any range.
    shard_bytes : int, default 256 MiB
        Rows are kept in memory until there are so many bytes, of all layers; then each layer's go
        to a shard of their own. What a kill loses.

    Returns
    -------
    ActivationStore
        From layer names to streams for `ipa_core.fit_projector`.

    Raises
    ------
    SettingError
        If the budget does not hold one batch, or the folder has a store with other settings.
    NonFiniteError
        If a value is beyond the range of ``dtype``; the message names the layer.
    StreamError
        If the batches are others than those that an interrupted store holds.
    FileFormatError
        If the index is damaged.
    LayerError
        If ``targets`` match nothing, or nothing that runs.

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
    model = unwrap_model(model)
    layers = select_layers(model, targets)
    half = torch.float16 if dtype == "float16" else torch.bfloat16
    inputs = SharedInputTree(
        dict.fromkeys(layers, 1), lambda _: cast(Learner, _RowBuffer(half)), None
    )
    collector = ActivationCollector(
        layers,
        inputs,
        RowWeighter(model, row_weights),
        max_patches=max_patches,
        max_rows=None,
        drop_failed=False,
    )
    settings = {"layers": [*layers], "max_patches": max_patches}
    writer = _Writer(Path(folder), inputs, dtype, settings, max_bytes, shard_bytes)
    run = default_forward if forward is None else forward
    bar = tqdm(desc="storing", unit=" rows", unit_scale=True, disable=None if progress else True)
    if writer.index.ended is None:
        with eval_mode(model), collector, bar:
            for batch in writer.skip_seen(batches):
                before = dict(inputs.node_of)
                with collector.batch(batch):
                    run(model, batch)
                bar.update(collector.rows)
                if not writer.record_batch(batch, before):
                    break
        writer.end()
    _report(layers, writer.index)
    return ActivationStore(folder)


class _RowBuffer:
    """Stands for a learner: keeps the rows, in half precision on the host, and learns nothing."""

    passes = 1

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._parts: tuple[tuple[torch.Tensor, torch.Tensor | None], ...] = ()
        self.samples = 0
        self.bytes = 0

    def begin_update(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> Deferred:
        """Copy the rows; they are checked and kept, by rebinding, in the second half."""
        # A copy, even where nothing has to be converted: the model may change its input later.
        kept = rows.to(self._dtype, copy=True).cpu()
        return Deferred(partial(self._keep, kept, weights))

    def _keep(self, kept: torch.Tensor, weights: torch.Tensor | None) -> Self:
        if not bool(torch.isfinite(kept).all()):
            bad = int((~torch.isfinite(kept).all(1)).sum())
            raise NonFiniteError(
                f"expected values that {self._dtype} can hold, got others in {bad} of "
                f"{kept.shape[0]} rows; store bfloat16, or mend what makes them"
            )
        own = None if weights is None else weights.to(torch.float32).cpu()
        self._parts += ((kept, own),)
        self.samples += kept.shape[0]
        self.bytes += kept.nbytes + (0 if own is None else own.nbytes)
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all rows, and their weights unless all are one."""
        made = {"rows": torch.cat([rows for rows, _ in self._parts])}
        if any(weights is not None for _, weights in self._parts):
            made["weights"] = torch.cat(
                [torch.ones(len(rows)) if own is None else own for rows, own in self._parts]
            )
        return made


class _Writer:
    """Collects what layers keep and writes it in shards; the index is always of whole ones."""

    def __init__(
        self,
        folder: Path,
        inputs: SharedInputTree,
        dtype: Half,
        settings: dict[str, Any],
        max_bytes: int | None,
        shard_bytes: int,
    ) -> None:
        self._folder = folder
        self._inputs = inputs
        self._fresh = dict(inputs.node_of)
        self._settings = settings
        self._max_bytes = max_bytes
        self._shard_bytes = shard_bytes
        self._reason = DATA_EXHAUSTED
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / INDEX).exists():
            self.index = Index.read(folder)
            own = {"dtype": dtype, **settings}
            got = {"dtype": self.index.dtype, **self.index.writer_state["settings"]}
            if own != got:
                raise SettingError(
                    f"expected a store of settings {own} in {folder}, got {got}; "
                    "take another folder"
                )
        else:
            self.index = Index({}, dtype, 0, None, {"settings": settings, "digest": "", "files": 0})
        self._batches = self.index.batches
        self._digest: str = self.index.writer_state["digest"]
        shards = {shard.file: shard.bytes for own in self.index.layers.values() for shard in own}
        self._written = sum(shards.values())

    def skip_seen(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Return the batches that the store does not hold yet."""
        left = iter(batches)
        for kind in (".index.json.*", ".*.safetensors.*"):
            for unfinished in self._folder.glob(kind):
                unfinished.unlink()
        if self._batches:
            skip(left, self._batches, self._digest, self._folder)
            state = bytearray.fromhex(self.index.writer_state["random"])
            torch.set_rng_state(torch.frombuffer(state, dtype=torch.uint8))
        return left

    def record_batch(self, batch: Any, before: Mapping[str, Any]) -> bool:
        """Count a batch; return whether there is room for more."""
        pending = [cast(_RowBuffer, node.learner).bytes + _HEADER for node in self._nodes()]
        if self._max_bytes is not None and self._written + sum(pending) > self._max_bytes:
            self._inputs.node_of.update(before)
            self._reason = f"max_bytes of {self._max_bytes:,} reached"
            if not self._batches:
                raise SettingError(
                    f"expected max_bytes of at least {sum(pending):,}, which the first batch "
                    f"takes, got {self._max_bytes:,}; allow more, or store fewer layers"
                )
            return False
        self._batches += 1
        self._digest = chained(self._digest, batch)
        if sum(pending) >= self._shard_bytes:
            self._flush(None)
        return True

    def end(self) -> None:
        """Write what is left."""
        if not self._batches:
            raise EmptyStreamError("expected at least one batch, got none")
        self._flush(self._reason)

    def _nodes(self) -> list[Any]:
        nodes = {id(node): node for node in self._inputs.node_of.values() if node.learner.samples}
        return list(nodes.values())

    def _flush(self, ended: str | None) -> None:
        layers = {name: list(own) for name, own in self.index.layers.items()}
        number = self.index.writer_state["files"]
        made: dict[int, Shard] = {}
        for node in self._nodes():
            data: bytes = to_bytes(node.learner.tensors())
            file = f"{number:08d}.safetensors"
            replace_file(self._folder / file, data)
            digest = hashlib.sha256(data).hexdigest()
            made[id(node)] = Shard(file, node.learner.samples, len(data), digest)
            self._written += len(data)
            number += 1
        for name, node in self._inputs.node_of.items():
            if id(node) in made:
                layers.setdefault(name, []).append(made[id(node)])
        order = [name for name in self._fresh if name in layers]
        random = torch.get_rng_state().numpy().tobytes().hex()
        self.index = Index(
            {name: tuple(layers[name]) for name in order},
            self.index.dtype,
            self._batches,
            ended,
            {
                "settings": self._settings,
                "digest": self._digest,
                "files": number,
                "random": random,
            },
        )
        self.index.write(self._folder)
        self._inputs.node_of.update(self._fresh)


def _report(layers: Mapping[str, nn.Module], index: Index) -> None:
    missing = [name for name in layers if name not in index.layers]
    if len(missing) == len(layers):
        raise LayerError("expected rows of at least one layer, got none; no forward of them ran")
    if missing:
        warnings.warn(
            f"expected rows of every layer, got none of {', '.join(map(repr, missing))}; "
            "leave them out of the targets, or feed batches that reach them",
            stacklevel=3,
        )
