"""Tree reduction of learners over the ranks of a process group."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch

from ipa_core import Projector
from ipa_core.io.serialization import pack_state, unpack_state
from ipa_torch._capture.autocast import no_grad_or_autocast
from ipa_torch._distributed.communicator import Communicator, ProcessGroup
from ipa_torch._distributed.mergeable_learner import MergeableLearner, ProjectorLearner
from ipa_torch.errors import PeerError

_FAILED = b"!"
_OK = b"."

# Roots move by the golden ratio: a model's wide layers recur every few learners, and with whole
# steps the same ranks would send them each time.
_ROOT_STEP = (5**0.5 - 1) / 2


L = TypeVar("L", bound=MergeableLearner)


def merge_across_ranks(
    learners: Mapping[str, ProjectorLearner], group: ProcessGroup | None
) -> dict[str, Projector | None]:
    """Return for each learner the projector of all ranks' rows; None if no rank has rows.

    For each learner the ranks with rows form a binomial tree. Summaries are merged from the leaves
    to the root in a fixed order, and the root broadcasts the projector, so that all ranks have the
    same bits. The roots rotate: each rank sends and receives about one summary for each learner,
    for any number of ranks. The learners do not change.

    Keys are layer names, for messages; all ranks must have them in the same order.

    Raises
    ------
    PeerError
        On all ranks, if a merge fails on any.
    """
    if group is None:
        return {
            name: _finalized(learner) if learner.samples else None
            for name, learner in learners.items()
        }
    states = merge_states(learners, group, lambda total: vars(total.finalize()))
    return {name: state and Projector(**state) for name, state in states.items()}


def merge_states(
    learners: Mapping[str, L],
    group: ProcessGroup,
    state_of: Callable[[L], Mapping[str, Any]],
    *,
    excluded: Collection[str] = (),
    errors: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Return for each learner a state of the learner merged over all ranks, as CPU tensors.

    As `merge_across_ranks`; ``state_of`` gives the state that the root broadcasts. Rows of the
    learners ``excluded`` do not count in this rank. The errors of learners that do not merge are
    added to ``errors``, if it is given.
    """
    if not learners:
        return {}
    comm = Communicator(group)
    rows = [0 if name in excluded else learner.samples for name, learner in learners.items()]
    trees = _trees(rows, comm)
    reduced = [
        _tree_reduce(learner, tree, comm, state_of) if comm.rank in tree else None
        for learner, tree in zip(learners.values(), trees, strict=True)
    ]
    states: dict[str, Any] = {}
    for name, message, tree in zip(learners, reduced, trees, strict=True):
        try:
            states[name] = _broadcast(name, message, tree, comm) if tree else None
        except PeerError as error:
            if errors is None:
                raise
            states[name], errors[name] = None, str(error)
    return states


def _trees(samples: list[int], comm: Communicator) -> list[list[int]]:
    """Return for each learner the ranks that have rows, the root first."""
    data = torch.tensor(samples, dtype=torch.int64, device="cpu").numpy().tobytes()
    counts = [torch.frombuffer(bytearray(part), dtype=torch.int64) for part in comm.gather(data)]
    trees = []
    for index in range(len(samples)):
        ranks = [rank for rank in range(comm.world_size) if int(counts[rank][index])]
        first = int(index * _ROOT_STEP % 1 * len(ranks))
        trees.append(ranks[first:] + ranks[:first])
    return trees


def _tree_reduce(
    learner: L,
    tree: list[int],
    comm: Communicator,
    state_of: Callable[[L], Mapping[str, Any]],
) -> bytes | None:
    """Send summaries down the tree; return the packed state at its root, None elsewhere."""
    position, step = tree.index(comm.rank), 1
    total = _attempt(learner.compact, learner)
    while step < len(tree):
        if position % (2 * step):
            comm.send(tree[position - step], _packed(total))
            return None
        if position + step < len(tree):
            total = _merged(total, comm.receive(tree[position + step]), learner)
        step *= 2
    if isinstance(total, str):
        return _FAILED + total.encode()
    state = _attempt(lambda: state_of(total), learner)
    return _FAILED + state.encode() if isinstance(state, str) else _OK + pack_state(state)


def _merged(total: L | str, message: bytes, learner: L) -> L | str:
    if isinstance(total, str):
        return total
    if message[:1] == _FAILED:
        return message[1:].decode()

    def merge() -> L:
        state = unpack_state(message[1:], library=torch, device=_device(learner))
        return total.merge(copy.copy(learner).load_state_dict(state))

    merged: L | str = _attempt(merge, learner)
    return merged


def _device(learner: MergeableLearner) -> torch.device:
    device: torch.device = learner.state_dict()["template"].device
    return device


def _finalized(learner: ProjectorLearner) -> Projector:
    with no_grad_or_autocast(_device(learner)):
        return learner.finalize()


def _attempt(call: Callable[[], Any], learner: MergeableLearner) -> Any:
    """Return the result of a call, or its error as text, since other ranks wait for a message."""
    try:
        with no_grad_or_autocast(_device(learner)):
            return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _packed(total: MergeableLearner | str) -> bytes:
    if isinstance(total, str):
        return _FAILED + total.encode()
    return _OK + pack_state(total.state_dict())


def _broadcast(name: str, message: bytes | None, tree: list[int], comm: Communicator) -> Any:
    """Return the state that the root sends to all ranks."""
    message = comm.broadcast(tree[0], message)
    if message[:1] == _FAILED:
        raise PeerError(f"layer {name!r}: expected learners that merge, got {message[1:].decode()}")
    return unpack_state(message[1:], library=torch)
