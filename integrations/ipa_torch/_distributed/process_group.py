"""Learning among the processes of a group: each on its own batches, with one result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from torch import nn

from ipa_core import Projector
from ipa_core.errors import EmptyStreamError, SettingError
from ipa_torch._distributed.comm import Communicator, ProcessGroup
from ipa_torch._distributed.tree_reduce import (
    MergeableLearner,
    merge_across_ranks,
    merge_states,
    world,
)
from ipa_torch.errors import PeerError

ProcessGroupArg: TypeAlias = "ProcessGroup | Literal['world'] | None"


class FitProcessGroup:
    """The processes that learn together; also this one alone.

    Whoever leaves the context by an exception tells the others, who raise `PeerError` when they
    want to merge: nobody waits for ever. Ctrl-C is not told: torchrun ends the others.
    """

    def __init__(self, members: ProcessGroupArg) -> None:
        group = world() if members == "world" else members
        self.group: ProcessGroup | None = group
        self._comm = None if group is None else Communicator(group)
        self._steps: _Lockstep | None = None
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
        if isinstance(error, Exception) and self._comm is not None and not self._over:
            self._leave()
            self._comm.gather(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())

    @property
    def folder(self) -> str | None:
        """Name of the folder in which this process keeps its own files; None if it is alone."""
        return None if self._comm is None else f"rank-{self._comm.rank}-of-{self._comm.world_size}"

    def begin(self, model: nn.Module) -> None:
        """Go in step from here on if the model is sharded: all take part in each forward pass."""
        if self._comm is not None:
            self._steps = _Lockstep(self._comm) if is_sharded(model) else None

    def lockstep(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Return the batches; of a sharded model, no more than every member has."""
        return batches if self._steps is None else self._steps.common(batches)

    def all_reduce_min(self, value: int) -> int:
        """Return the least of the numbers above 0 of members who go in step, 0 if one has left.

        Where they go by themselves it is ``value``.
        """
        return value if self._steps is None else self._steps.all_reduce_min(value)

    def merge(
        self, learners: Mapping[str, MergeableLearner], seen: int
    ) -> dict[str, Projector | None]:
        """Return for each layer's pupil the projector of everybody's rows; None if nobody has any.

        Raises
        ------
        PeerError, EmptyStreamError
            If another process failed, or no process had a batch.
        """
        if self.group is not None:
            ranks = {name: learner.rank for name, learner in learners.items()}
            self.exchange({"layers": ranks, "seen": seen})
        return self.merge_learners(learners)

    def merge_learners(
        self, learners: Mapping[str, MergeableLearner]
    ) -> dict[str, Projector | None]:
        """Merge each learner over all ranks; return its projector everywhere, None without rows.

        Raises
        ------
        PeerError
            If another process failed.
        """
        with self._over_if_a_peer_fails():
            return merge_across_ranks(learners, self.group)

    def merge_states(
        self,
        learners: Mapping[str, MergeableLearner],
        state_of: Callable[[MergeableLearner], Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Merge each learner over all ranks; return its state everywhere, None without rows.

        Raises
        ------
        PeerError
            If another process failed.
        """
        assert self.group is not None
        with self._over_if_a_peer_fails():
            return merge_states(learners, self.group, state_of)

    @contextmanager
    def _over_if_a_peer_fails(self) -> Iterator[None]:
        try:
            yield
        except PeerError:
            self._over = True
            raise

    def exchange(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        """Return everybody's report; raise if one failed or has other layers, or all saw none."""
        assert self._comm is not None
        self._leave()
        reports = [json.loads(data) for data in self._comm.gather(json.dumps(report).encode())]
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


class _Lockstep:
    """What members do at the same time: before each step they tell each other a number.

    It is 0 of one who goes no further, and then nobody does.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._over = False

    def all_reduce_min(self, value: int) -> int:
        """Return the least of everybody's numbers."""
        least = 0 if self._over else self._comm.all_reduce_min(value)
        self._over = not least
        return least

    def common(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches as long as every member has one."""
        for batch in batches:
            if not self.all_reduce_min(1):
                return
            yield batch
        self.leave()

    def leave(self) -> None:
        """Let the others end as well."""
        self.all_reduce_min(0)


def is_sharded(model: nn.Module) -> bool:
    """Return whether the processes hold parts of the model's weights (FSDP)."""
    return any(
        hasattr(parameter, "full_tensor") or hasattr(parameter, "_is_flat_param")
        for parameter in model.parameters()
    )
