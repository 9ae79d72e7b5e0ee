"""Checkpoints of a fit, and resuming from them."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch

from ipa_core import load_state
from ipa_core.caller_warnings import warn_caller
from ipa_core.errors import FileFormatError, SettingError, with_context
from ipa_core.io.atomic_write import replace_file
from ipa_core.io.file_header import reading
from ipa_core.io.paths import as_path
from ipa_core.io.serialization import pack_state, unpack_state
from ipa_torch._fit.attention_head_learners import LayerLearner
from ipa_torch._fit.collector import ActivationCollector, CollectorState
from ipa_torch._fit.folder_lock import LOCK
from ipa_torch._fit.resumable_pass import ResumablePass
from ipa_torch._fit.shared_inputs import InputPrefix
from ipa_torch._settings import check_positive

_INDEX = "index.safetensors"
_VERSION = 4
_CHECKPOINTS_KEPT = 2
#: Begin of the names of folders that are being written or removed.
_UNFINISHED = ".writing-"


@dataclass(frozen=True)
class CheckpointConfig:
    """Folder and frequency of the checkpoints of `fit_projectors`.

    Parameters
    ----------
    folder : path-like
        Created if missing. It has the two latest checkpoints of a single run, each a folder that is
        written atomically.
    batches : int, optional
        Number of batches between checkpoints.
    seconds : float or None, default 300
        Seconds between checkpoints.

    Examples
    --------
    >>> from ipa_torch import CheckpointConfig
    >>> CheckpointConfig("learning", batches=100, seconds=None).batches
    100
    """

    folder: str | os.PathLike[str]
    batches: int | None = None
    seconds: float | None = 300.0

    def __post_init__(self) -> None:
        for name in ("batches", "seconds"):
            check_positive(name, getattr(self, name))
        object.__setattr__(self, "folder", as_path(self.folder))

    @classmethod
    def of(cls, checkpoint: CheckpointLike) -> Self:
        """Return a configuration; that of a folder has the default frequency."""
        return checkpoint if isinstance(checkpoint, cls) else cls(checkpoint)  # type: ignore[arg-type]

    def of_process(self, name: str | None) -> Self:
        """Return the same for a rank with the folder name ``rank-1-of-4``, say; None without ranks.

        Raises
        ------
        SettingError
            If the folder has checkpoints of another number of processes, with other batches.
        """
        folder = Path(self.folder)
        names = [path.name for path in folder.glob("*-*")] if os.path.isdir(folder) else []
        sizes = {name.rpartition("-of-")[2] for name in names if name.startswith("rank-")}
        single = any(name.startswith("step-") for name in names)
        size = None if name is None else name.rpartition("-of-")[2]
        if sizes - {size} or (single and name is not None):
            raise SettingError(
                f"expected checkpoints of {size or 1} processes in {self.folder}, got those of "
                f"{', '.join(sorted(sizes)) or 1}; start as many, or use another folder"
            )
        return self if name is None else self._under(name)

    def of_memory_pass(self, number: int, passes: int) -> Self:
        """Return the same for a memory pass: a folder for each, if there are several."""
        return self if passes == 1 else self._under(f"pass-{number + 1}-of-{passes}")

    def _under(self, name: str) -> Self:
        return replace(self, folder=Path(self.folder) / name)


CheckpointLike: TypeAlias = "CheckpointConfig | str | os.PathLike[str]"


@dataclass
class CheckpointWriter:
    """Writer of the checkpoints of a pass; without ``config`` it only counts the batches.

    `all_reduce_min` keeps the ranks of a sharded model on the same checkpoint.
    """

    config: CheckpointConfig | None
    collector: ActivationCollector[LayerLearner]
    position: ResumablePass
    all_reduce_min: Callable[[int], int]
    _written: int = 0
    _last: float = field(default_factory=time.monotonic)

    def skip_seen(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Restore the collector from the latest checkpoint; return the remaining batches.

        Raises
        ------
        FileFormatError
            If the checkpoint is damaged or of another format version; the message has the cure.
        SettingError
            If it is of a run with other settings or weights.
        StreamError
            If the batches differ from those of the checkpoint.
        """
        remaining = iter(batches)
        if self.config is None:
            return remaining
        folder = Path(self.config.folder)
        for unfinished in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(unfinished)
        steps = steps_in(folder)
        common = self.all_reduce_min(1 + _seen(steps))
        if not common:
            return iter(())
        steps = _up_to(common - 1, steps)
        if steps:
            index = _load(steps, self.collector, self.position)
            self.position.skip(remaining, index, steps[-1])
            self._written = self.position.seen
        return remaining

    def record_batch(self, batch: Any) -> None:
        """Count a batch; write a checkpoint if it is due."""
        self.position.record_batch(batch)
        if self.config is None:
            return
        every, seconds = self.config.batches, self.config.seconds
        due = (every is not None and self.position.seen - self._written >= every) or (
            seconds is not None and time.monotonic() - self._last >= seconds
        )
        if self.all_reduce_min(1 if due else 2) == 1:
            self.write()

    def write(self) -> None:
        """Write a checkpoint, unless there is one of this batch."""
        seen = self.position.seen
        if self.config is None or seen == self._written:
            return
        folder = Path(self.config.folder)
        scratch = folder / f"{_UNFINISHED}{os.getpid()}"
        index = {"format_version": _VERSION, **self.position.state()}
        try:
            scratch.mkdir()
            _save(scratch, self.collector.snapshot(), index)
            os.replace(scratch, folder / f"step-{seen:010d}")
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        for old in steps_in(folder)[:-_CHECKPOINTS_KEPT]:
            _remove(old)
        self._written, self._last = seen, time.monotonic()

    def write_last(self) -> None:
        """Write a checkpoint at the end of a run, which is no reason to lose its result.

        Warns
        -----
        UserWarning
            If it cannot be written.
        """
        try:
            self.write()
        except OSError as error:
            warn_caller(
                f"the last checkpoint cannot be written ({error}); save the result: the same call "
                f"would learn again from batch {self._written}",
            )


def steps_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the latest last."""
    return sorted(folder.glob("step-*"))


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished fit, and the folder if it has no other files."""
    with suppress(OSError):
        for pattern in ("step-*", "pass-*-of-*", "rank-*-of-*"):
            for path in folder.glob(pattern):
                _remove(path)
        for unfinished in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(unfinished)
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _remove(step: Path) -> None:
    """Remove a checkpoint; an interruption leaves no part of it that passes for a checkpoint."""
    hidden = step.with_name(f"{_UNFINISHED}{step.name}")
    os.replace(step, hidden)
    shutil.rmtree(hidden)


def _seen(steps: list[Path]) -> int:
    """Return the number of batches of the latest checkpoint."""
    return int(steps[-1].name.removeprefix("step-")) if steps else 0


def _up_to(seen: int, steps: list[Path]) -> list[Path]:
    """Return the checkpoints up to the latest that all ranks have; remove later checkpoints."""
    kept = [step for step in steps if _seen([step]) <= seen]
    if _seen(kept) != seen:
        raise FileFormatError(
            f"expected a checkpoint of {seen} batches, the latest of another process, got those of "
            f"{[_seen([step]) for step in steps]}; delete all checkpoints to start over"
        )
    if kept != steps:
        warn_caller(
            f"learning resumes from batch {seen}, not {_seen(steps)}: another process ended "
            "before it wrote that checkpoint",
        )
        for step in steps[len(kept) :]:
            _remove(step)
    return kept


def _save(folder: Path, state: CollectorState[LayerLearner], index: dict[str, Any]) -> None:
    nodes = []
    for number, (node, names) in enumerate(state.groups()):
        parts = {"learner": node.learner.state_dict()}
        if node.convergence is not None:
            parts["convergence"] = node.convergence.state_dict()
        digests = {
            part: _write_file(folder / f"{number}.{part}.safetensors", pack_state(part_state))
            for part, part_state in parts.items()
        }
        nodes.append({"layers": names, "sha256": digests})
    index |= {
        "nodes": nodes,
        "ran": {name: str(device) for name, device in state.ran.items()},
        "stopped": dict(state.stopped),
        "failed": dict(state.failed),
        "bypassed": sorted(state.bypassed),
    }
    _write_file(folder / _INDEX, pack_state(index))


def _write_file(path: Path, data: bytes) -> str:
    """Write a file, and return its digest."""
    replace_file(path, data)
    return hashlib.sha256(data).hexdigest()


def _load(
    steps: list[Path], collector: ActivationCollector[LayerLearner], position: ResumablePass
) -> dict[str, Any]:
    """Restore a collector from the latest checkpoint; return the index."""
    folder = steps[-1]
    try:
        index = load_state(folder / _INDEX, library=torch)
        if (version := index.get("format_version", 1)) != _VERSION:
            raise FileFormatError(f"{folder}: expected format version {_VERSION}, got {version}")
        position.check(index, folder)
        if index["seen"] != _seen([folder]):
            raise FileFormatError(f"{folder}: got the checkpoint of {index['seen']} batches")
        with reading(folder, "the index of a checkpoint"):
            state = _read_state(folder, index, collector.snapshot().node_of)
    except (FileFormatError, OSError) as error:
        cure = f"resume from {steps[-2].name}" if len(steps) > 1 else "start over"
        raise FileFormatError(
            f"expected a complete checkpoint, got {error}; delete {folder} to {cure}: later "
            "batches are lost"
        ) from error
    collector.restore(state)
    return index


def _read_state(
    folder: Path, index: dict[str, Any], fresh: Mapping[str, InputPrefix[LayerLearner]]
) -> CollectorState[LayerLearner]:
    ran = {name: torch.device(device) for name, device in index["ran"].items()}
    nodes: dict[str, InputPrefix[LayerLearner]] = {}
    for number, entry in enumerate(index["nodes"]):
        names = entry["layers"]
        device = next((ran[name] for name in names if name in ran), None)
        start = fresh[names[0]]
        node = InputPrefix(copy.copy(start.learner), start.convergence)
        states = {
            part: _read_bound(folder / f"{number}.{part}.safetensors", digest, device)
            for part, digest in entry["sha256"].items()
        }
        try:
            node.learner.load_state_dict(states["learner"])
        except SettingError as error:
            raise with_context(error, f"{folder}, layer {names[0]!r}") from error
        if "convergence" in states and node.convergence is not None:
            node.convergence = node.convergence.with_state(states["convergence"])
        nodes |= dict.fromkeys(names, node)
    return CollectorState(
        {name: nodes[name] for name in fresh},
        ran,
        dict(index["stopped"]),
        dict(index["failed"]),
        frozenset(index["bypassed"]),
    )


def _read_bound(path: Path, sha256: str, device: torch.device | None) -> dict[str, Any]:
    """Return the state in a file of the digest that the index has: of this layer, run and step."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise FileFormatError(f"{path}: expected the file of the index's digest, got another")
    return unpack_state(data, library=torch, device=device)
