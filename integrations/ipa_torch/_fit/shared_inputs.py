"""Shared consumers of layers with the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from ipa_torch._capture.async_update import AsyncUpdate
from ipa_torch._capture.row_consumer import RowConsumer
from ipa_torch._fit.convergence import Convergence
from ipa_torch._layers.row_view import WeightedRows

C = TypeVar("C", bound=RowConsumer)


class InputPrefix(Generic[C]):
    """Node of the tree: a sequence of inputs, its learner, and the next inputs in this batch."""

    __slots__ = ("convergence", "learner", "next")

    def __init__(self, learner: C, convergence: Convergence | None) -> None:
        self.learner = learner
        self.convergence = convergence
        self.next: dict[Hashable, InputPrefix[C]] = {}


@dataclass(frozen=True)
class PendingInput(Generic[C]):
    """Input of a layer whose update has begun, and the nodes before and after it."""

    name: str
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

    The tree holds the update that has begun, which is finished before another layer moves. The
    child is in the tree from then on: after an error the next layer with this input begins its own
    update.
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
        self.pending: PendingInput[C] | None = None
        self._branched: list[InputPrefix[C]] = []

    def advance(self, name: str, event: Hashable) -> bool:
        """Move a layer to the node after an input; return False if there is none yet."""
        child = self.node_of[name].next.get(event)
        if child is not None:
            self.node_of[name] = child
        return child is not None

    def begin(self, name: str, event: Hashable, rows: WeightedRows) -> None:
        """Begin the update of a new node after an input, with its rows and weights."""
        assert self.pending is None
        node = self.node_of[name]
        convergence = node.convergence and node.convergence.observe(node.learner, *rows)
        child = InputPrefix(copy.copy(node.learner), convergence)
        update = AsyncUpdate.begin(child.learner, rows)
        self.pending = PendingInput(name, event, node, child, update)

    def finish(self) -> None:
        """Finish the update that has begun, if there is one, and move its layer."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        pending.update.finish()
        if not pending.node.next:
            self._branched.append(pending.node)
        pending.node.next[pending.event] = self.node_of[pending.name] = pending.child

    def end_batch(self) -> None:
        """Drop the children: inputs of the next batch are new."""
        for node in self._branched:
            node.next.clear()
        self._branched.clear()
