"""Interface of learners of a layer's inputs and of the gradients of its outputs."""

from __future__ import annotations

from typing import Protocol

import torch

from ipa_torch._distributed.mergeable_learner import ProjectorLearner


class GradientLearner(ProjectorLearner, Protocol):
    """A learner of a layer's input rows x and the gradients g of its output rows."""

    def update(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add rows x (n, groups, features) with gradients g (n, groups, outputs of a group)."""
