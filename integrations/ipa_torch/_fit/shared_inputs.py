"""Shared consumers of layers with the same inputs."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from ipa_core.errors import IPAError
from ipa_torch._capture.async_update import AsyncUpdate
from ipa_torch._capture.row_consumer import RowConsumer
from ipa_torch._fit.convergence import Convergence
from ipa_torch._layers.row_view import WeightedRows

C = TypeVar("C", bound=RowConsumer)

#: Updates that may wait on an asynchronous device, each with a copy of its rows. A single one would
#: keep the host at most one layer ahead of the device, which then stands still between layers.
MOST_PENDING = 4


class InputPrefix(Generic[C]):
    """Node of the tree: a sequence of inputs, its learner, and the next inputs in this batch."""

    __slots__ = ("convergence", "learner", "next")

    def __init__(self, learner: C, convergence: Convergence | None) -> None:
        self.learner = learner
        self.convergence = convergence
        self.next: dict[Hashable, InputPrefix[C]] = {}


@dataclass(frozen=True)
class PendingInput(Generic[C]):
    """Input whose update has begun, and the nodes before and after it."""

    event: Hashable
    node: InputPrefix[C]
    child: InputPrefix[C]
    update: AsyncUpdate


class SharedInputTree(Generic[C]):
    """Prefix tree of the inputs of layers, with the node of each layer.

    Layers of the same rank start at the same root. A layer with an input moves to the child of its
    node for this input; the first layer there creates the child from a copy of the learner and
    updates it. So layers share a learner exactly as long as they have had the same inputs. They
    branch when control flow, or an expert that a batch skips, gives them different inputs.

    The tree holds the updates that have begun, and finishes them in this order. A learner begins no
    update before its last one is finished.
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        make_learner: Callable[[int], C],
        convergence: Convergence | None,
    ) -> None:
        roots = {
            rank: InputPrefix(make_learner(rank), convergence)
            for rank in sorted(set(ranks.values()))
        }
        self.node_of = {name: roots[rank] for name, rank in ranks.items()}
        self._pending: deque[PendingInput[C]] = deque()
        self._branched: list[InputPrefix[C]] = []

    def advance(self, name: str, event: Hashable) -> bool:
        """Move a layer to the node after an input; return False if there is none yet."""
        child = self.node_of[name].next.get(event)
        if child is not None:
            self.node_of[name] = child
        return child is not None

    def begin(self, name: str, event: Hashable, rows: WeightedRows) -> None:
        """Begin the update of a new node after an input, with its rows and weights; move there.

        The rows must stay as they are until the update is finished.
        """
        node = self.node_of[name]
        convergence = node.convergence and node.convergence.observe(node.learner, *rows)
        child = InputPrefix(copy.copy(node.learner), convergence)
        update = AsyncUpdate.begin(child.learner, rows)
        self._pending.append(PendingInput(event, node, child, update))
        if not node.next:
            self._branched.append(node)
        node.next[event] = self.node_of[name] = child

    def is_pending(self, name: str) -> bool:
        """Return whether the last update of a layer's learner is not finished."""
        return any(pending.child is self.node_of[name] for pending in self._pending)

    def has_pending(self, *, due: bool) -> bool:
        """Return whether an update is not finished; with ``due``, whether one should be.

        An update on a CPU is due at once, and those before it.
        """
        if not due or not self._pending:
            return bool(self._pending)
        return len(self._pending) > MOST_PENDING or not self._pending[-1].update.is_async

    def finish(self) -> dict[str, IPAError]:
        """Finish the update that has begun first; return its layers with the error, if it failed.

        These layers are then where they were before its input.
        """
        pending = self._pending.popleft()
        try:
            pending.update.finish()
        except BaseException as error:
            layers = self._move_back(pending)
            if not isinstance(error, IPAError):
                raise
            return dict.fromkeys(layers, error)
        return {}

    def end_batch(self) -> None:
        """Drop the children: inputs of the next batch are new."""
        for pending in self._pending:  # after an error of another one
            self._move_back(pending)
        self._pending.clear()
        for node in self._branched:
            node.next.clear()
        self._branched.clear()

    def _move_back(self, pending: PendingInput[C]) -> list[str]:
        """Take an input's node out of the tree; return the layers there, which move back."""
        pending.node.next.pop(pending.event, None)
        layers = [name for name, node in self.node_of.items() if node is pending.child]
        self.node_of.update(dict.fromkeys(layers, pending.node))
        return layers
