"""Shared learners of layers with the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from functools import partial

from ipa_core import Learner
from ipa_torch._fit.early_stopping import Convergence
from ipa_torch._layers.matmul_view import WeightedRows


class InputPrefix:
    """Node of the tree: a sequence of inputs, its learner, and the next inputs in this batch."""

    __slots__ = ("convergence", "learner", "next")

    def __init__(self, learner: Learner, convergence: Convergence | None) -> None:
        self.learner = learner
        self.convergence = convergence
        self.next: dict[Hashable, InputPrefix] = {}

    def branch(self, rows: WeightedRows) -> tuple[InputPrefix, Callable[[], object]]:
        """Return the node after another input, and the call that finishes its update.

        This node does not change.
        """
        convergence = self.convergence and self.convergence.observe(self.learner, *rows)
        learner = copy.copy(self.learner)
        return InputPrefix(learner, convergence), learner.begin_update(*rows).finish


class SharedInputTree:
    """Prefix tree of the inputs of layers, with the node of each layer.

    Layers of the same rank start at the same root. A layer with an input moves to the child of its
    node for this input; the first layer there creates the child from a copy of the learner and
    updates it. So layers share a learner exactly as long as they have had the same inputs. They
    branch when control flow, or an expert that a batch skips, gives them different inputs.
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        make_learner: Callable[[int], Learner],
        convergence: Convergence | None,
    ) -> None:
        roots = {
            rank: InputPrefix(make_learner(rank), convergence)
            for rank in sorted(set(ranks.values()))
        }
        self.node_of = {name: roots[rank] for name, rank in ranks.items()}
        self._branched: list[InputPrefix] = []

    def advance(
        self, name: str, event: Hashable, rows: Callable[[], WeightedRows]
    ) -> Callable[[], None] | None:
        """Move a layer to the node after an input; ``rows`` computes rows and weights, if needed.

        Return the call that finishes the update, if this layer begins it, or None. It must run
        before another layer moves.
        """
        node, finish_update = self.node_of[name], None
        if event not in node.next:
            child, finish = node.branch(rows())
            if not node.next:
                self._branched.append(node)
            node.next[event] = child
            finish_update = partial(self._finish, name, node, event, finish)
        self.node_of[name] = node.next[event]
        return finish_update

    def _finish(
        self, name: str, node: InputPrefix, event: Hashable, finish: Callable[[], object]
    ) -> None:
        try:
            finish()
        except BaseException:
            # Back to the node before: the next layer with this input begins its own update.
            del node.next[event]
            self.node_of[name] = node
            raise

    def end_batch(self) -> None:
        """Drop the children: inputs of the next batch are new."""
        for node in self._branched:
            node.next.clear()
        self._branched.clear()
