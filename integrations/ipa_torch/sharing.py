"""Learners of layers that see the same inputs, kept once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping

from ipa_core import Learner
from ipa_torch.reading import Rows
from ipa_torch.stopping import Convergence


class Node:
    """A history of inputs: what was learned from it, and how it went on in this batch."""

    __slots__ = ("convergence", "learner", "next")

    def __init__(self, learner: Learner, convergence: Convergence | None) -> None:
        self.learner = learner
        self.convergence = convergence
        self.next: dict[Hashable, Node] = {}

    def after(self, rows: Rows) -> Node:
        """Return the history that one more input makes of this one, which stays as it is."""
        convergence = self.convergence and self.convergence.look(self.learner, *rows)
        return Node(copy.copy(self.learner).update(*rows), convergence)


class Histories:
    """Where each layer stands in the tree of input histories.

    All layers of one rank start at one root. A layer that is given an input moves on to the child
    that this input has led to from there; the first to come makes it, from a snapshot of the
    learner, and pays for learning. So layers share a learner exactly as long as they have seen the
    same inputs, and part when control flow, or an expert that a batch skips, parts them.
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        learner: Callable[[int], Learner],
        convergence: Convergence | None,
    ) -> None:
        roots = {rank: Node(learner(rank), convergence) for rank in sorted(set(ranks.values()))}
        self.at = {name: roots[rank] for name, rank in ranks.items()}
        self._left: list[Node] = []

    def see(self, name: str, event: Hashable, rows: Callable[[], Rows]) -> None:
        """Move a layer on by an input; ``rows`` computes its rows and weights, if needed."""
        node = self.at[name]
        if event not in node.next:
            reached = node.after(rows())
            if not node.next:
                self._left.append(node)
            node.next[event] = reached
        self.at[name] = node.next[event]

    def end_batch(self) -> None:
        """Cut the ways that lead on: inputs of the next batch are others, old nodes can go."""
        for node in self._left:
            node.next.clear()
        self._left.clear()
