"""Writing down where learning stands, and going on from there."""

from __future__ import annotations

import copy
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch

from ipa_core import load_state, save_state
from ipa_core.errors import FileFormatError, SettingError, StreamError, with_context
from ipa_torch._fit.batch_digest import chained
from ipa_torch._fit.collector import ActivationCollector, CollectorState
from ipa_torch._fit.shared_inputs import InputPrefix

_INDEX = "index.safetensors"
_VERSION = 2
_KEPT = 2


@dataclass(frozen=True)
class CheckpointConfig:
    """Where and how often `fit_projectors` writes down where it stands.

    Parameters
    ----------
    folder : path-like
        Made if it is not there. It holds one run: the two latest checkpoints, each a folder that
        appears whole or not at all.
    batches : int, optional
        Write after so many batches.
    seconds : float or None, default 300
        Write once so many seconds have passed since the last time.

    Examples
    --------
    >>> from ipa_torch import CheckpointConfig
    >>> CheckpointConfig("learning", batches=100, seconds=None)
    CheckpointConfig(folder='learning', batches=100, seconds=None)
    """

    folder: str | os.PathLike[str]
    batches: int | None = None
    seconds: float | None = 300.0

    def __post_init__(self) -> None:
        for name in ("batches", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingError(f"expected {name} above 0 or None, got {value!r}")

    @classmethod
    def of(cls, given: CheckpointLike) -> Self:
        """Return the checkpoints of what a caller gave: a folder alone has the usual ones."""
        return given if isinstance(given, cls) else cls(given)  # type: ignore[arg-type]

    def under(self, name: str) -> Self:
        """Return the same in a folder of that folder."""
        return replace(self, folder=Path(self.folder) / name)

    def of_process(self, name: str | None) -> Self:
        """Return the same for one of several processes, named ``rank-1-of-4``, say.

        Raises
        ------
        SettingError
            If there are checkpoints of another number of processes, whose batches were others.
        """
        there = {path.name.rpartition("-of-")[2] for path in Path(self.folder).glob("rank-*-of-*")}
        alone = any(Path(self.folder).glob("step-*"))
        wanted = None if name is None else name.rpartition("-of-")[2]
        if there - {wanted} or (alone and name is not None):
            raise SettingError(
                f"expected checkpoints of {wanted or 1} processes in {self.folder}, got those of "
                f"{', '.join(sorted(there)) or 1}; start as many, or take another folder"
            )
        return self if name is None else self.under(name)


CheckpointLike: TypeAlias = "CheckpointConfig | str | os.PathLike[str]"


@dataclass
class CheckpointWriter:
    """Counts the batches of a run, and writes down where it stands when that is due.

    Without ``checkpoints`` it only counts. `all_reduce_min` keeps the ranks of a sharded model on
    the same checkpoint.
    """

    checkpoints: CheckpointConfig | None
    collector: ActivationCollector
    settings: Mapping[str, Any]
    all_reduce_min: Callable[[int], int]
    seen: int = 0
    _digest: str = ""
    _written: int = 0
    _last: float = field(default_factory=time.monotonic)

    def skip_seen(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Return the batches that are left, the listener being put where it stood.

        Raises
        ------
        FileFormatError
            If the checkpoint is damaged; the message says what is lost.
        SettingError
            If it is of a run with other settings.
        StreamError
            If the batches are others than those it has seen.
        """
        left = iter(batches)
        if self.checkpoints is None:
            return left
        folder = Path(self.checkpoints.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob(".writing-*"):
            shutil.rmtree(unfinished)
        steps = steps_in(folder)
        common = self.all_reduce_min(1 + _seen(steps))
        if not common:
            return iter(())
        steps = _up_to(common - 1, steps)
        if steps:
            index = _load(steps, self.collector, self.settings)
            self.seen = self._written = index["seen"]
            self._digest = skip(left, self.seen, index["digest"], steps[-1])
            torch.set_rng_state(index["random"])
        return left

    def record_batch(self, batch: Any) -> None:
        """Count a batch that has been learned from; write if it is time."""
        self.seen += 1
        if self.checkpoints is None:
            return
        self._digest = chained(self._digest, batch)
        every, seconds = self.checkpoints.batches, self.checkpoints.seconds
        due = (every is not None and self.seen - self._written >= every) or (
            seconds is not None and time.monotonic() - self._last >= seconds
        )
        if self.all_reduce_min(1 if due else 2) == 1:
            self.write()

    def write(self) -> None:
        """Write down where the listener stands, unless that is written already."""
        if self.checkpoints is None or self.seen == self._written:
            return
        folder = Path(self.checkpoints.folder)
        scratch = folder / f".writing-{os.getpid()}"
        scratch.mkdir()
        index = {
            "format_version": _VERSION,
            "seen": self.seen,
            "digest": self._digest,
            "settings": dict(self.settings),
            "random": torch.get_rng_state(),
        }
        _save(scratch, self.collector.snapshot(), index)
        os.replace(scratch, folder / f"step-{self.seen:010d}")
        for old in steps_in(folder)[:-_KEPT]:
            shutil.rmtree(old)
        self._written, self._last = self.seen, time.monotonic()


def steps_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the latest one last."""
    return sorted(folder.glob("step-*"))


def _seen(steps: list[Path]) -> int:
    """Return how many batches the latest checkpoint has seen."""
    return int(steps[-1].name.removeprefix("step-")) if steps else 0


def _up_to(seen: int, steps: list[Path]) -> list[Path]:
    """Return the checkpoints up to the latest that all processes have; remove the others."""
    kept = [step for step in steps if _seen([step]) <= seen]
    if _seen(kept) != seen:
        raise FileFormatError(
            f"expected a checkpoint of {seen} batches, the latest in another process, got those of "
            f"{[_seen([step]) for step in steps]}; delete the checkpoints of all to start anew"
        )
    if kept != steps:
        warnings.warn(
            f"learning goes on from batch {seen}, not {_seen(steps)}: another process was ended "
            "before it had written that checkpoint",
            stacklevel=2,
        )
        for step in steps[len(kept) :]:
            shutil.rmtree(step)
    return kept


def _save(folder: Path, state: CollectorState, index: dict[str, Any]) -> None:
    nodes = []
    for number, (node, names) in enumerate(state.groups()):
        save_state(node.learner.state_dict(), folder / f"{number}.safetensors")
        nodes.append({"layers": names, "converging": node.convergence is not None})
        if node.convergence is not None:
            save_state(node.convergence.state_dict(), folder / f"{number}.convergence.safetensors")
    index |= {
        "nodes": nodes,
        "ran": {name: str(device) for name, device in state.ran.items()},
        "stopped": dict(state.stopped),
        "failed": dict(state.failed),
        "bypassed": sorted(state.bypassed),
    }
    save_state(index, folder / _INDEX)


def _load(
    steps: list[Path], collector: ActivationCollector, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Put a listener where the latest checkpoint stands; return the index."""
    folder = steps[-1]
    try:
        index = load_state(folder / _INDEX, library=torch)
        if (version := index.get("format_version", 1)) != _VERSION:
            raise FileFormatError(f"{folder}: expected format version {_VERSION}, got {version}")
        if index["settings"] != settings:
            raise SettingError(
                f"{folder}: expected the checkpoint of a run with settings {dict(settings)}, got "
                f"{index['settings']}; take another folder, or delete this one to start anew"
            )
        state = _read_state(folder, index, collector.snapshot().node_of)
    except (FileFormatError, FileNotFoundError) as error:
        rest = f"go on from {steps[-2].name}" if len(steps) > 1 else "start anew"
        raise FileFormatError(
            f"expected a whole checkpoint, got {error}; delete {folder} to {rest}: what was "
            "learned since is lost"
        ) from error
    collector.resume(state)
    return index


def _read_state(
    folder: Path, index: dict[str, Any], fresh: Mapping[str, InputPrefix]
) -> CollectorState:
    ran = {name: torch.device(device) for name, device in index["ran"].items()}
    reached: dict[str, InputPrefix] = {}
    for number, entry in enumerate(index["nodes"]):
        names = entry["layers"]
        devices = [ran[name] for name in names if name in ran]
        start = fresh[names[0]]
        node = InputPrefix(copy.copy(start.learner), start.convergence)
        device = devices[0] if devices else None
        path = folder / f"{number}.safetensors"
        try:
            node.learner.load_state_dict(load_state(path, library=torch, device=device))
        except SettingError as error:
            raise with_context(error, str(path)) from error
        if entry["converging"] and node.convergence is not None:
            path = folder / f"{number}.convergence.safetensors"
            node.convergence = node.convergence.with_state(
                load_state(path, library=torch, device=device)
            )
        reached |= dict.fromkeys(names, node)
    return CollectorState(
        {name: reached[name] for name in fresh},
        ran,
        index["stopped"],
        index["failed"],
        frozenset(index["bypassed"]),
    )


def skip(batches: Iterator[Any], count: int, wanted: str, folder: Path) -> str:
    """Go past the batches that were learned from, if they are the same; return their digest."""
    digest = ""
    for number in range(count):
        try:
            digest = chained(digest, next(batches))
        except StopIteration:
            raise StreamError(
                f"expected at least the {count} batches that {folder} has seen, got {number}"
            ) from None
    if digest != wanted:
        raise StreamError(
            f"expected the first {count} batches to be those that {folder} has seen, got others; "
            "give them in the same order (seed the loader), or delete the folder to start anew"
        )
    return digest
