"""Learners of layers that see the same inputs, kept once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from functools import partial

from ipa_core import Learner
from ipa_torch._fit.early_stopping import Convergence
from ipa_torch._layers.matmul_view import WeightedRows


class InputPrefix:
    """A history of inputs: what was learned from it, and how it went on in this batch."""

    __slots__ = ("convergence", "learner", "next")

    def __init__(self, learner: Learner, convergence: Convergence | None) -> None:
        self.learner = learner
        self.convergence = convergence
        self.next: dict[Hashable, InputPrefix] = {}

    def branch(self, rows: WeightedRows) -> tuple[InputPrefix, Callable[[], object]]:
        """Return the history that one more input makes of this one, and what is left to do for it.

        This one stays as it is.
        """
        convergence = self.convergence and self.convergence.observe(self.learner, *rows)
        learner = copy.copy(self.learner)
        return InputPrefix(learner, convergence), learner.begin_update(*rows).finish


class SharedInputTree:
    """Where each layer stands in the tree of input histories.

    All layers of one rank start at one root. A layer that is given an input moves on to the child
    that this input has led to from there; the first to come makes it, from a snapshot of the
    learner, and pays for learning. So layers share a learner exactly as long as they have seen the
    same inputs, and part when control flow, or an expert that a batch skips, parts them.
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
        self._left: list[InputPrefix] = []

    def advance(
        self, name: str, event: Hashable, rows: Callable[[], WeightedRows]
    ) -> Callable[[], None] | None:
        """Move a layer on by an input; ``rows`` computes its rows and weights, if needed.

        What is returned, if this layer pays for learning, is the second half of that: to be called
        before any other layer moves.
        """
        node, rest = self.node_of[name], None
        if event not in node.next:
            reached, finish = node.branch(rows())
            if not node.next:
                self._left.append(node)
            node.next[event] = reached
            rest = partial(self._finish, name, node, event, finish)
        self.node_of[name] = node.next[event]
        return rest

    def _finish(
        self, name: str, node: InputPrefix, event: Hashable, finish: Callable[[], object]
    ) -> None:
        try:
            finish()
        except BaseException:
            # Back to before: the next layer with this input finds out for itself.
            del node.next[event]
            self.node_of[name] = node
            raise

    def end_batch(self) -> None:
        """Cut the ways that lead on: inputs of the next batch are others, old nodes can go."""
        for node in self._left:
            node.next.clear()
        self._left.clear()
