"""View of a layer's output as rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ipa_torch._layers.layer_properties import Convolution
from ipa_torch._layers.linear_view import LinearView
from ipa_torch._layers.row_subset import RowSubset
from ipa_torch._layers.row_view import WeightedRows
from ipa_torch._layers.unwrap import unwrap_layer


@dataclass(frozen=True)
class OutputView:
    """Rows along the axis of the features, or channels, of an output."""

    axis: int = -1

    def row_shape(self, activation: torch.Tensor) -> tuple[int, ...]:
        """Return the shape over which an activation has rows."""
        return tuple(activation.movedim(self.axis, -1).shape[:-1])

    def im2row(
        self, activation: torch.Tensor, subset: RowSubset, limit: int | None
    ) -> WeightedRows:
        """Return rows and weights, as for every `MatmulView`; all positions are used."""
        return LinearView().im2row(activation.movedim(self.axis, -1), subset, limit)


def output_view(module: nn.Module) -> OutputView:
    """Return the view of a layer's output: the channels of a convolution, else the last axis."""
    module = unwrap_layer(module)
    axes = len(module.kernel_size) if isinstance(module, Convolution) else 0
    return OutputView(-1 - axes)
