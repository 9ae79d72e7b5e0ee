"""Process group of a fit: exchange of errors and of reports, merge of learners."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from torch import distributed, nn

from ipa_core import Projector
from ipa_core.errors import EmptyStreamError, SettingError
from ipa_core.settings import check_instance
from ipa_torch._distributed.communicator import Communicator, ProcessGroup
from ipa_torch._distributed.lockstep import Lockstep
from ipa_torch._distributed.mergeable_learner import ProjectorLearner
from ipa_torch._distributed.parallel_wrappers import is_sharded
from ipa_torch._distributed.tree_reduce import L, merge_across_ranks, merge_states
from ipa_torch.errors import PeerError

ProcessGroupArg: TypeAlias = "ProcessGroup | Literal['world'] | None"


class FitProcessGroup:
    """Ranks that fit together, or this process alone.

    A rank that leaves the context by an exception sends the error to the others, which raise
    `PeerError` at the merge instead of waiting. Ctrl-C is not sent: torchrun ends the others.
    """

    def __init__(self, process_group: ProcessGroupArg) -> None:
        group = _resolve(process_group)
        self.group: ProcessGroup | None = group
        self._comm = None if group is None else Communicator(group)
        self._lockstep: Lockstep | None = None
        self._over = False
        #: Whether any rank was interrupted.
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
            self._stop_lockstep()
            self._comm.gather(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())

    @property
    def folder(self) -> str | None:
        """Name of this rank's folder of checkpoints; None without a group."""
        return None if self._comm is None else f"rank-{self._comm.rank}-of-{self._comm.world_size}"

    def begin(self, model: nn.Module) -> None:
        """Start lockstep if the model is sharded, as all ranks take part in each forward pass."""
        if self._comm is not None:
            self._lockstep = Lockstep(self._comm) if is_sharded(model) else None

    def lockstep(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Return the batches; of a sharded model, as many as every rank has."""
        return batches if self._lockstep is None else self._lockstep.common(batches)

    def all_reduce_min(self, value: int) -> int:
        """Return the smallest positive number of all ranks in lockstep, 0 if a rank has stopped.

        Without lockstep it is ``value``.
        """
        return value if self._lockstep is None else self._lockstep.all_reduce_min(value)

    def merge(
        self, learners: Mapping[str, ProjectorLearner], seen: int
    ) -> dict[str, Projector | None]:
        """Check the reports of all ranks, then merge the learners; see `merge_learners`.

        Raises
        ------
        PeerError, EmptyStreamError
            If another rank failed, or no rank had a batch.
        """
        if self.group is not None:
            ranks = {name: learner.rank for name, learner in learners.items()}
            self.exchange({"layers": ranks, "seen": seen})
        return self.merge_learners(learners)

    def merge_learners(
        self, learners: Mapping[str, ProjectorLearner]
    ) -> dict[str, Projector | None]:
        """Merge each learner over all ranks; return its projector everywhere, None without rows.

        Raises
        ------
        PeerError
            If another rank failed.
        """
        with self._over_if_a_peer_fails():
            return merge_across_ranks(learners, self.group)

    def merge_states(
        self,
        learners: Mapping[str, L],
        state_of: Callable[[L], Mapping[str, Any]],
        *,
        excluded: Collection[str],
        errors: dict[str, str] | None,
    ) -> dict[str, Any]:
        """Merge each learner over all ranks; return its state everywhere, None without rows.

        The parameters are those of `tree_reduce.merge_states`.

        Raises
        ------
        PeerError
            If another process failed.
        """
        assert self.group is not None
        with self._over_if_a_peer_fails():
            return merge_states(learners, self.group, state_of, excluded=excluded, errors=errors)

    @contextmanager
    def _over_if_a_peer_fails(self) -> Iterator[None]:
        try:
            yield
        except PeerError:
            self._over = True
            raise

    def exchange(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the reports of all ranks.

        Raises
        ------
        PeerError, SettingError, EmptyStreamError
            If a rank failed or has other layers, or no rank had a batch.
        """
        assert self._comm is not None
        self._stop_lockstep()
        reports = [json.loads(data) for data in self._comm.gather(json.dumps(report).encode())]
        for rank, peer_report in enumerate(reports):
            if "failed" in peer_report:
                self._over = True
                raise PeerError(f"process {rank} failed with {peer_report['failed']}")
        equal = [peer_report["layers"] == reports[0]["layers"] for peer_report in reports]
        if not all(equal):
            self._over = True
            raise SettingError(
                "expected the same targets, ranks and (with max_bytes) passes in all processes, "
                f"got others in process {equal.index(False)}"
            )
        if not any(peer_report["seen"] for peer_report in reports):
            self._over = True
            reasons = " / ".join(filter(None, (each.get("interrupted") for each in reports)))
            raise EmptyStreamError(
                f"expected at least one batch in any process, got none{reasons and f' ({reasons})'}"
                "; check that the loaders are neither empty nor used up"
            )
        return reports

    def _stop_lockstep(self) -> None:
        if self._lockstep is not None:
            self._lockstep.leave()


def _resolve(process_group: ProcessGroupArg) -> ProcessGroup | None:
    """Return the group that an argument names."""
    if isinstance(process_group, str) and process_group == "world":
        return world()
    if process_group is not None:
        kinds = (distributed.ProcessGroup,) if distributed.is_available() else ()
        form = "'world', None or a process group of torch.distributed"
        check_instance("process_group", process_group, kinds, form)
    return process_group


def world() -> ProcessGroup | None:
    """Return the group of all ranks; None in a single process."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.group.WORLD
    return None
