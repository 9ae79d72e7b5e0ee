"""View of a convolution as a matrix product: patches times the kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ipa_core.errors import ShapeError
from ipa_torch._layers.layer_properties import Convolution
from ipa_torch._layers.row_samples import stratified_indices
from ipa_torch._layers.row_subset import RowSubset
from ipa_torch._layers.row_view import WeightedRows
from ipa_torch.errors import LayerError

_STOCK = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class ConvView:
    """View of convolutions: each group's part of a patch is a row, with one P for all groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[int, ...]
    mode: str

    def row_shape(self, activation: torch.Tensor) -> tuple[int, ...]:
        """Return the shape over which an activation has rows.

        Raises
        ------
        ShapeError
            If it has neither channels and positions, nor a batch of them.
        """
        axes = len(self.kernel)
        if activation.ndim not in (axes + 1, axes + 2):
            raise ShapeError(
                f"expected an input of {axes + 1} or {axes + 2} axes, got shape "
                f"{tuple(activation.shape)}; give it (batch, channels, positions), or leave it out "
                "of the targets"
            )
        batch = activation.shape[:1] if activation.ndim == axes + 2 else (1,)
        padding = self.padding_of(activation)
        paddings = zip(padding[-2::-2], padding[::-2], strict=True)
        sizes = zip(activation.shape[-axes:], paddings, self._steps(), strict=True)
        return (*batch, *((n + sum(p) - extent) // step + 1 for n, p, (extent, step) in sizes))

    def im2row(
        self, activation: torch.Tensor, subset: RowSubset, limit: int | None
    ) -> WeightedRows:
        """Return rows and weights, as for every `MatmulView`."""
        row_shape, axes = self.row_shape(activation), len(self.kernel)
        positions, weights = subset.positions, subset.weights
        if positions is None:
            positions = torch.arange(math.prod(row_shape), device=activation.device)
        sampled = stratified_indices(positions.shape[0], limit)
        if sampled is not None:
            positions = positions.index_select(0, sampled.to(positions.device))
            weights = None if weights is None else weights.index_select(0, sampled)
        windows = self._windows(activation if activation.ndim == axes + 2 else activation[None])
        rows = windows[torch.unravel_index(positions, row_shape)].flatten(2).flatten(0, 1)
        return rows, None if weights is None else weights.repeat_interleave(self.groups)

    def _windows(self, activation: torch.Tensor) -> torch.Tensor:
        """Return a view (batch, *positions, groups, channels, *kernel) of all patches."""
        axes = len(self.kernel)
        windows = self._padded(activation)
        for axis, (extent, step) in enumerate(self._steps()):
            windows = windows.unfold(2 + axis, extent, step)[..., :: self.dilation[axis]]
        windows = windows.movedim(1, 1 + axes)
        return torch.unflatten(windows, 1 + axes, (self.groups, -1))

    def rows_and_grads(
        self, activation: torch.Tensor, gradient: torch.Tensor, limit: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows and gradients at the same positions, by groups."""
        axes = len(self.kernel)
        batched = gradient if gradient.ndim == axes + 2 else gradient[None]
        positions = stratified_indices(math.prod(self.row_shape(activation)), limit)
        positions = None if positions is None else positions.to(activation.device)
        rows, _ = self.im2row(activation, RowSubset(positions), None)
        grads = batched.movedim(1, -1).reshape(-1, self.groups, batched.shape[1] // self.groups)
        grads = grads if positions is None else grads.index_select(0, positions)
        return rows.unflatten(0, (-1, self.groups)), grads

    def project(self, activation: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        """Multiply each row by a matrix (rank, features)."""
        kernels = projection.reshape(projection.shape[0], -1, *self.kernel)
        kernels = kernels.repeat(self.groups, *(1 for _ in range(kernels.ndim - 1)))
        return _CONVOLVE[len(self.kernel)](
            self._padded(activation),
            kernels,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
        )

    def expand(self, projected: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Multiply each projected row by a matrix (outputs, rank)."""
        points = matrix.reshape(*matrix.shape, *(1 for _ in self.kernel))
        return _CONVOLVE[len(self.kernel)](projected, points, groups=self.groups)

    def delta_weight(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the matrix in the layout of the weight."""
        return matrix.reshape(like.shape)

    def padding_of(self, activation: torch.Tensor) -> tuple[int, ...]:
        """Return the padding as in `F.pad`: two numbers for each axis, the last axis first."""
        return self.padding

    def _padded(self, activation: torch.Tensor) -> torch.Tensor:
        padding = self.padding_of(activation)
        return F.pad(activation, padding, mode=self.mode) if any(padding) else activation

    def _steps(self) -> list[tuple[int, int]]:
        extents = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))
        return list(zip(extents, self.stride, strict=True))


def conv_view_of(module: Convolution) -> ConvView:
    """Return the view of one of torch's convolutions.

    Raises
    ------
    LayerError
        If its class overrides ``forward``.
    """
    if type(module).forward not in _STOCK:
        # It may pad the input or normalize the weight, which the adapter would not.
        raise LayerError(
            f"expected a convolution with the forward of torch, got {type(module).__name__} "
            "with its own forward; leave it out of the targets"
        )
    padding: Any = module._reversed_padding_repeated_twice
    return ConvView(
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        dilation=tuple(module.dilation),
        groups=module.groups,
        padding=tuple(padding),
        mode="constant" if module.padding_mode == "zeros" else module.padding_mode,
    )
