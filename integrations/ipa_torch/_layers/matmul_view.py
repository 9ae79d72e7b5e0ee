"""View of a layer as a matrix product: rows of its input times its weight."""

from __future__ import annotations

from functools import singledispatch
from typing import Protocol

import torch
from torch import nn

from ipa_torch._layers.conv_view import ConvView, conv_view_of
from ipa_torch._layers.layer_properties import is_conv1d
from ipa_torch._layers.linear_view import LinearView
from ipa_torch._layers.row_view import RowView
from ipa_torch._layers.unwrap import unwrap_layer
from ipa_torch.errors import LayerError


class MatmulView(RowView, Protocol):
    """View of a layer as y = M x for each row x of its input, with M of (outputs, features)."""

    def rows_and_grads(
        self, activation: torch.Tensor, gradient: torch.Tensor, limit: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows (n, groups, features) and their outputs' gradients (n, groups, outputs)."""

    def project(self, activation: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        """Multiply each row by a matrix (rank, features), in the layout of the layer's output."""

    def expand(self, projected: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Multiply each row of a `project` result by a matrix (outputs, rank)."""

    def delta_weight(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return a matrix (outputs, features) in the layout of the layer's weight ``like``."""


@singledispatch
def view_of(module: nn.Module) -> LinearView | ConvView:
    """Return the view of a layer as a matrix product.

    A package with its own class of convolutions registers a view for it:
    ``view_of.register(cls)(function)``.

    Raises
    ------
    LayerError
        If the layer does not multiply rows by a matrix, or is a convolution with its own forward.
    """
    if (base := unwrap_layer(module)) is not module:
        return view_of(base)
    if isinstance(module, torch.jit.ScriptModule):
        raise LayerError(
            "expected a layer that can have hooks, got a scripted one; leave it out of the "
            "targets, or script the model afterwards"
        )
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        raise LayerError(
            f"expected a layer that multiplies rows of its input, got {type(module).__name__}; "
            "leave it out of the targets"
        )
    return LinearView(transposed=is_conv1d(module))


for _convolution in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    view_of.register(_convolution)(conv_view_of)
