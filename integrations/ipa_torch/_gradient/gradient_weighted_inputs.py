"""Learner of a layer's inputs, weighted by the norms of the output gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch

from ipa_core import Learner, Projector, RandomizedSVD
from ipa_core.learners._validation import check_mergeable
from ipa_core.learners.factory import make_learner
from ipa_torch._gradient.gradient_learner import check_rows_and_grads


class GradientWeightedInputs:
    r"""Leading directions of the inputs, with each row weighted by its gradient's norm.

    .. math:: \min_{P P^\top = I_r} \sum_i |g_i| \, \|x_i - P^\top P x_i\|^2

    with the gradient :math:`g_i` of the output row that :math:`x_i` gives. The norms are not
    normalized, so that the weights of several ranks fit together.

    Memory and time are those of the learner.

    Parameters
    ----------
    rank : int
    learner : callable, default `ipa_core.RandomizedSVD`
        Makes a learner of the inputs from its rank.

    Examples
    --------
    >>> import torch
    >>> x, g = torch.eye(3)[:, None], torch.tensor([[[1.0]], [[9.0]], [[1.0]]])
    >>> weighted = GradientWeightedInputs(rank=1)
    >>> weighted.update(x, g)
    >>> int(weighted.finalize().components.abs().argmax())
    1
    """

    def __init__(self, rank: int, *, learner: Callable[[int], Learner] = RandomizedSVD) -> None:
        self._inputs = make_learner(learner, rank)

    @property
    def rank(self) -> int:
        """Rows of P."""
        return self._inputs.rank

    @property
    def samples(self) -> int:
        """Number of rows with a gradient."""
        return self._inputs.samples

    def update(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add rows x (n, groups, features) with gradients g (n, groups, outputs of a group)."""
        check_rows_and_grads(x, g)
        norms = torch.linalg.vector_norm(g.float(), dim=-1).flatten()
        self._inputs.update(x.flatten(0, 1), norms)

    def merge(self, other: Self) -> Self:
        """Return the learner of both parts."""
        check_mergeable(self, other, ())
        return self._with(self._inputs.merge(other._inputs))

    def finalize(self) -> Projector:
        """Return the projector of the rows so far."""
        return self._inputs.finalize()

    def compact(self) -> Self:
        """Return the same in its smallest form."""
        return self._with(self._inputs.compact())

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the learner of the inputs."""
        return self._inputs.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Take over a state from `state_dict`."""
        self._inputs = copy.copy(self._inputs).load_state_dict(state)
        return self

    def _with(self, inputs: Learner) -> Self:
        changed = copy.copy(self)
        changed._inputs = inputs
        return changed
