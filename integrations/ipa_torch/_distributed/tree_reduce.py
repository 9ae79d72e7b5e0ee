"""One projector for all processes of a group, from what each of them learned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import torch
from torch import distributed

from ipa_core import Projector
from ipa_core.io.serialization import pack_state, unpack_state
from ipa_torch._capture.eval_mode import no_autocast
from ipa_torch._distributed.comm import Communicator, ProcessGroup
from ipa_torch.errors import PeerError

_FAILED = b"!"
_OK = b"."

# Roots move by the golden ratio: a model's wide layers recur every few learners, and with whole
# steps it would be the same members who send them each time.
_STEP = (5**0.5 - 1) / 2


class MergeableLearner(Protocol):
    """What `ipa_core.Learner` is to others who learned the same; its state has a ``template``."""

    rank: int
    samples: int

    def compact(self) -> Self:
        """Return the same in its smallest form."""

    def merge(self, other: Self) -> Self:
        """Return what was learned from both parts."""

    def finalize(self) -> Projector:
        """Return the projector of what was seen."""

    def state_dict(self) -> dict[str, Any]:
        """Return settings, counts and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Take over a state."""


def world() -> ProcessGroup | None:
    """Return the group of all processes; None if this one is by itself."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.group.WORLD
    return None


def merge_across_ranks(
    learners: Mapping[str, MergeableLearner], group: ProcessGroup | None
) -> dict[str, Projector | None]:
    """Return for each learner the projector of all members' rows; None if nobody has rows.

    For each learner the members that have rows form a binomial tree; summaries are merged from its
    leaves to its root, always in the same order, and the root sends the projector round: it is the
    same everywhere, to the bit. The roots take turns, so that each member sends and receives about
    one summary for each learner, however many members there are. The learners stay as they are.

    The learners are named by a layer each, for messages; all members must have them in one order.

    Raises
    ------
    PeerError
        Everywhere, if merging fails anywhere.
    """
    if group is None:
        return {name: _finalized(one) if one.samples else None for name, one in learners.items()}
    states = merge_states(learners, group, lambda total: vars(total.finalize()))
    return {name: state and Projector(**state) for name, state in states.items()}


def merge_states(
    learners: Mapping[str, MergeableLearner],
    group: ProcessGroup,
    state_of: Callable[[MergeableLearner], Mapping[str, Any]],
) -> dict[str, Any]:
    """Return for each learner a state, of numbers and CPU tensors, of the learner of all ranks.

    As `merge_across_ranks`, of which ``state_of`` says what the root sends.
    """
    comm = Communicator(group)
    trees = _trees([learner.samples for learner in learners.values()], comm)
    named = [(name, learners[name], tree) for name, tree in zip(learners, trees, strict=True)]
    done = [
        _tree_reduce(one, tree, comm, state_of) if comm.rank in tree else None
        for _, one, tree in named
    ]
    return {
        name: _broadcast(name, mine, tree, comm) if tree else None
        for mine, (name, _, tree) in zip(done, named, strict=True)
    }


def _trees(samples: list[int], comm: Communicator) -> list[list[int]]:
    """Return for each learner the members that have rows, the root first."""
    mine = torch.tensor(samples, dtype=torch.int64).numpy().tobytes()
    counts = [torch.frombuffer(bytearray(part), dtype=torch.int64) for part in comm.gather(mine)]
    trees = []
    for index in range(len(samples)):
        having = [member for member in range(comm.world_size) if int(counts[member][index])]
        turn = int(index * _STEP % 1 * len(having))
        trees.append(having[turn:] + having[:turn])
    return trees


def _tree_reduce(
    learner: MergeableLearner,
    tree: list[int],
    comm: Communicator,
    state_of: Callable[[MergeableLearner], Mapping[str, Any]],
) -> bytes | None:
    """Pass summaries down the tree; return the packed state at its root."""
    place, step = tree.index(comm.rank), 1
    total = _attempt(learner.compact, learner)
    while step < len(tree):
        if place % (2 * step):
            comm.send(tree[place - step], _packed(total))
            return None
        if place + step < len(tree):
            total = _merged(total, comm.receive(tree[place + step]), learner)
        step *= 2
    if isinstance(total, str):
        return _FAILED + total.encode()
    state = _attempt(lambda: state_of(total), learner)
    return _FAILED + state.encode() if isinstance(state, str) else _OK + pack_state(state)


def _merged(
    total: MergeableLearner | str, message: bytes, learner: MergeableLearner
) -> MergeableLearner | str:
    if isinstance(total, str):
        return total
    if message[:1] == _FAILED:
        return message[1:].decode()

    def merge() -> MergeableLearner:
        state = unpack_state(message[1:], library=torch, device=_device(learner))
        return total.merge(copy.copy(learner).load_state_dict(state))

    merged: MergeableLearner | str = _attempt(merge, learner)
    return merged


def _device(learner: MergeableLearner) -> torch.device:
    device: torch.device = learner.state_dict()["template"].device
    return device


def _finalized(learner: MergeableLearner) -> Projector:
    with no_autocast(_device(learner)):
        return learner.finalize()


def _attempt(work: Any, learner: MergeableLearner) -> Any:
    """Return what work gives, or in words what went wrong: others wait for an answer."""
    try:
        with no_autocast(_device(learner)):
            return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _packed(total: MergeableLearner | str) -> bytes:
    if isinstance(total, str):
        return _FAILED + total.encode()
    return _OK + pack_state(total.state_dict())


def _broadcast(name: str, mine: bytes | None, tree: list[int], comm: Communicator) -> Any:
    """Return the state that the root sends to all ranks."""
    message = comm.broadcast(tree[0], mine)
    if message[:1] == _FAILED:
        raise PeerError(f"layer {name!r}: expected learners that merge, got {message[1:].decode()}")
    return unpack_state(message[1:], library=torch)
