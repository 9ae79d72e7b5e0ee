"""Learning among the processes of a group: each on its own batches, with one result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import nn

from ipa_core import Projector
from ipa_core.errors import EmptyStreamError, SettingError
from ipa_torch._capture.forward import device_of
from ipa_torch._distributed.comm import ProcessGroup, Wire
from ipa_torch._distributed.tree_reduce import Mergeable, agreed, world
from ipa_torch._fit.collector import NEVER_RAN, Listener, Standing
from ipa_torch.errors import PeerError
from ipa_torch.projectors import Projectors

Members: TypeAlias = "ProcessGroup | Literal['world'] | None"


class Company:
    """The processes that learn together; also this one alone.

    Whoever leaves the context by an exception tells the others, who raise `PeerError` when they
    want to merge: nobody waits for ever. Ctrl-C is not told: torchrun ends the others.
    """

    def __init__(self, members: Members) -> None:
        group = world() if members == "world" else members
        self.group: ProcessGroup | None = group
        self._wire = None if group is None else Wire(group)
        self._steps: _Steps | None = None
        self._over = False
        #: Whether learning was, in this process or another, and goes no further.
        self.interrupted = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and self._wire is not None and not self._over:
            self._leave()
            self._wire.gather(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())

    @property
    def folder(self) -> str | None:
        """Name of the folder in which this process keeps its own files; None if it is alone."""
        return None if self._wire is None else f"rank-{self._wire.me}-of-{self._wire.size}"

    def begin(self, model: nn.Module) -> None:
        """Go in step from here on if the model is sharded: all take part in each forward pass."""
        if self._wire is not None:
            self._steps = _Steps(self._wire) if is_sharded(model) else None

    def in_step(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Return the batches; of a sharded model, no more than every member has."""
        return batches if self._steps is None else self._steps.common(batches)

    def least(self, value: int) -> int:
        """Return the least of the numbers above 0 of members who go in step, 0 if one has left.

        Where they go by themselves it is ``value``.
        """
        return value if self._steps is None else self._steps.least(value)

    def finish(
        self,
        listener: Listener,
        layers: Mapping[str, nn.Module],
        reason: str,
        seen: int,
        interrupted: bool,
    ) -> Projectors:
        """Return what all members learned, the same everywhere.

        Raises
        ------
        PeerError
            If a member failed.
        EmptyStreamError
            If nobody had a batch.
        """
        self.interrupted = interrupted
        if self.group is None:
            return listener.finish(reason)
        standing = listener.standing()
        own = _report(standing, reason, seen) | {"interrupted": interrupted}
        reports = self._exchange(own)
        self.interrupted = any(report["interrupted"] for report in reports)
        unfit = {name: why for report in reports for name, why in report["unfit"].items()}
        groups = _common(standing, reports, unfit)
        learners = {names[0]: standing.at[names[0]].learner for names in groups}
        found = self._agreed(learners)
        learned: dict[str, Projector] = {}
        for names in groups:
            projector = found[names[0]]
            if projector is not None:
                device = standing.ran.get(names[0]) or device_of(layers[names[0]])
                learned |= dict.fromkeys(names, projector.to(torch, device=device))
        ordered = {name: learned[name] for name in standing.at if name in learned}
        missing = {
            name: unfit.get(name) or _joined(reports, "missing", name, NEVER_RAN)
            for name in standing.at
            if name not in learned
        }
        stopped = {name: _joined(reports, "stopped", name, reason) for name in ordered}
        return Projectors(ordered, missing=missing, stopped=stopped)

    def merged(self, pupils: Mapping[str, Mergeable], seen: int) -> dict[str, Projector | None]:
        """Return for each layer's pupil the projector of everybody's rows; None if nobody has any.

        Raises
        ------
        PeerError, EmptyStreamError
            As `finish` does.
        """
        if self.group is not None:
            ranks = {name: pupil.rank for name, pupil in pupils.items()}
            self._exchange({"layers": ranks, "seen": seen})
        return self._agreed(pupils)

    def _agreed(self, pupils: Mapping[str, Mergeable]) -> dict[str, Projector | None]:
        try:
            return agreed(pupils, self.group)
        except PeerError:
            self._over = True
            raise

    def _exchange(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        """Return everybody's report; raise if one failed or has other layers, or all saw none."""
        assert self._wire is not None
        self._leave()
        reports = [json.loads(data) for data in self._wire.gather(json.dumps(report).encode())]
        for rank, other in enumerate(reports):
            if "failed" in other:
                self._over = True
                raise PeerError(f"process {rank} failed with {other['failed']}")
        if any(other["layers"] != reports[0]["layers"] for other in reports):
            self._over = True
            raise SettingError(
                "expected the same targets, ranks and (with max_bytes) passes in all processes, "
                "got others in process "
                f"{[other['layers'] == reports[0]['layers'] for other in reports].index(False)}"
            )
        if not any(other["seen"] for other in reports):
            self._over = True
            raise EmptyStreamError(
                "expected at least one batch in one of the processes, got none; "
                "check that the loaders are neither empty nor used up"
            )
        return reports

    def _leave(self) -> None:
        if self._steps is not None:
            self._steps.leave()


class _Steps:
    """What members do at the same time: before each step they tell each other a number.

    It is 0 of one who goes no further, and then nobody does.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._over = False

    def least(self, value: int) -> int:
        """Return the least of everybody's numbers."""
        least = 0 if self._over else self._wire.least(value)
        self._over = not least
        return least

    def common(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches as long as every member has one."""
        for batch in batches:
            if not self.least(1):
                return
            yield batch
        self.leave()

    def leave(self) -> None:
        """Let the others end as well."""
        self.least(0)


def is_sharded(model: nn.Module) -> bool:
    """Return whether the processes hold parts of the model's weights (FSDP)."""
    return any(
        hasattr(parameter, "full_tensor") or hasattr(parameter, "_is_flat_param")
        for parameter in model.parameters()
    )


def _report(standing: Standing, reason: str, seen: int) -> dict[str, Any]:
    missing = {name: why for name in standing.at if (why := standing.missing(name)) is not None}
    groups = [names for _, names in standing.groups()]
    stops = {name: standing.stopped.get(name, reason) for name in standing.at}
    return {
        "seen": seen,
        "layers": {name: node.learner.rank for name, node in standing.at.items()},
        "groups": groups,
        "unfit": dict(standing.unfit),
        # A member without batches has no say in why there is no projector, or why learning ended.
        "missing": missing if seen else {},
        "stopped": {name: why for name, why in stops.items() if name not in missing},
    }


def _common(
    standing: Standing, reports: list[dict[str, Any]], unfit: Mapping[str, str]
) -> list[list[str]]:
    """Return groups of layers that shared their inputs in every member."""
    keys: dict[str, list[int]] = {name: [] for name in standing.at if name not in unfit}
    for report in reports:
        for number, names in enumerate(report["groups"]):
            for name in names:
                if name in keys:
                    keys[name].append(number)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(tuple(key), []).append(name)
    return list(groups.values())


def _joined(reports: list[dict[str, Any]], kind: str, name: str, default: str) -> str:
    """Return why, once for all members who say the same."""
    reasons = dict.fromkeys(report[kind][name] for report in reports if name in report[kind])
    return " / ".join(reasons) or default
