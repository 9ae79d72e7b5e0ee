"""Interface of learners that merge over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from ipa_core import Projector


class MergeableLearner(Protocol):
    """Interface of learners that merge.

    The state of a learner with samples has a tensor ``template``.
    """

    @property
    def rank(self) -> int:
        """Rank of the projector."""

    @property
    def samples(self) -> int:
        """Number of rows so far."""

    def compact(self) -> Self:
        """Return the same in its smallest form."""

    def merge(self, other: Self) -> Self:
        """Return the learner of both parts."""

    def state_dict(self) -> dict[str, Any]:
        """Return settings, counts and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Take over a state."""


class ProjectorLearner(MergeableLearner, Protocol):
    """Interface of learners of a projector that merge, such as `ipa_core.Learner`."""

    def finalize(self) -> Projector:
        """Return the projector of the rows so far."""
