"""Interface of learners of a layer's inputs and of the gradients of its outputs."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from ipa_core.errors import ArrayTypeError, ShapeError
from ipa_core.settings import check_instance
from ipa_torch._distributed.mergeable_learner import ProjectorLearner


@runtime_checkable
class GradientLearner(ProjectorLearner, Protocol):
    """A learner of a layer's input rows x and the gradients g of its output rows."""

    def update(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add rows x (n, groups, features) with gradients g (n, groups, outputs of a group)."""


def check_rows_and_grads(x: Any, g: Any) -> None:
    """Check input rows and gradients of output rows.

    Raises
    ------
    ArrayTypeError, ShapeError
        If they are no dense floating tensors, or their shapes do not fit together.
    """
    for name, tensor in (("x", x), ("g", g)):
        check_instance(name, tensor, torch.Tensor, "a tensor", error=ArrayTypeError)
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise ArrayTypeError(
                f"expected {name} to be a dense floating tensor, got {tensor.dtype} in "
                f"{tensor.layout}"
            )
    if x.ndim != 3 or g.ndim != 3 or x.shape[:2] != g.shape[:2]:
        raise ShapeError(
            "expected x of shape (n, groups, features) and g of shape (n, groups, outputs), got "
            f"{tuple(x.shape)} and {tuple(g.shape)}"
        )
