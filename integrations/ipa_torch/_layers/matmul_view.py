"""How a layer reads its input: as rows that one matrix multiplies."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from ipa_core.errors import ArrayTypeError
from ipa_torch.errors import LayerError

RowSubset: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None]
WeightedRows: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
_STOCK = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class MatmulView(Protocol):
    """The view of a layer as y = M x for every row x of its input, with M of (outputs, features).

    Equal readings of one tensor give equal rows; a reading can be hashed.
    """

    def row_shape(self, activation: torch.Tensor) -> tuple[int, ...]:
        """Return the axes that number the places of an activation."""

    def im2row(
        self, activation: torch.Tensor, subset: RowSubset, limit: int | None
    ) -> WeightedRows:
        """Return the rows (n, features) at the chosen places, or everywhere, and their weights.

        At most ``limit`` patches are taken.
        """

    def rows_and_grads(
        self, activation: torch.Tensor, gradient: torch.Tensor, limit: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows (n, groups, features) and their outputs' gradients (n, groups, outputs)."""

    def project(self, activation: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        """Apply a matrix (rank, features) to every row, in the layout of the layer's output."""

    def expand(self, projected: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Apply a matrix (outputs, rank) to what `project` gave, to the layer's output."""

    def delta_weight(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return a matrix (outputs, features) in the layout of the layer's weight ``like``."""


@dataclass(frozen=True)
class LinearView:
    """Rows along the last axis, of ``nn.Linear`` and everything that is like it."""

    transposed: bool = False

    def row_shape(self, activation: torch.Tensor) -> tuple[int, ...]:
        """Return the axes that number the places."""
        return tuple(activation.shape[:-1])

    def im2row(
        self, activation: torch.Tensor, subset: RowSubset, limit: int | None
    ) -> WeightedRows:
        """Return rows and weights, as for every `MatmulView`."""
        places, weights = subset
        rows = activation.reshape(-1, activation.shape[-1])
        return (rows if places is None else rows.index_select(0, places)), weights

    def rows_and_grads(
        self, activation: torch.Tensor, gradient: torch.Tensor, limit: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows and gradients, in one group."""
        rows, own = (t.reshape(-1, 1, t.shape[-1]) for t in (activation, gradient))
        return rows, own

    def project(self, activation: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        """Apply a matrix (rank, features) to every row."""
        return F.linear(activation, projection)

    def expand(self, projected: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Apply a matrix (outputs, rank) to every place."""
        return F.linear(projected, matrix)

    def delta_weight(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the matrix in the layout of the weight."""
        return matrix.T if self.transposed else matrix


@dataclass(frozen=True)
class ConvView:
    """Patches of a convolution; each group's part of one is a row: P is common to all groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[int, ...]
    mode: str

    def row_shape(self, activation: torch.Tensor) -> tuple[int, ...]:
        """Return the axes that number the places."""
        batch = activation.shape[:1] if activation.ndim == len(self.kernel) + 2 else (1,)
        padding = self.padding_of(activation)
        rows_and_grads = zip(padding[-2::-2], padding[::-2], strict=True)
        sizes = zip(
            activation.shape[-len(self.kernel) :], rows_and_grads, self._steps(), strict=True
        )
        return (*batch, *((n + sum(p) - extent) // step + 1 for n, p, (extent, step) in sizes))

    def im2row(
        self, activation: torch.Tensor, subset: RowSubset, limit: int | None
    ) -> WeightedRows:
        """Return rows and weights, as for every `MatmulView`."""
        row_shape, axes = self.row_shape(activation), len(self.kernel)
        places, weights = subset
        if places is None:
            places = torch.arange(math.prod(row_shape), device=activation.device)
        drawn = stratified_indices(places.shape[0], limit, activation.device)
        if drawn is not None:
            places = places.index_select(0, drawn)
            weights = None if weights is None else weights.index_select(0, drawn)
        windows = self._windows(activation if activation.ndim == axes + 2 else activation[None])
        rows = windows[torch.unravel_index(places, row_shape)].flatten(2).flatten(0, 1)
        return rows, None if weights is None else weights.repeat_interleave(self.groups)

    def _windows(self, activation: torch.Tensor) -> torch.Tensor:
        """Return a view (batch, *places, groups, channels, *kernel) of all patches."""
        axes = len(self.kernel)
        windows = self._padded(activation)
        for axis, (extent, step) in enumerate(self._steps()):
            windows = windows.unfold(2 + axis, extent, step)[..., :: self.dilation[axis]]
        windows = windows.movedim(1, 1 + axes)
        return torch.unflatten(windows, 1 + axes, (self.groups, -1))

    def rows_and_grads(
        self, activation: torch.Tensor, gradient: torch.Tensor, limit: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows and gradients at the same places, by groups."""
        axes = len(self.kernel)
        batched = gradient if gradient.ndim == axes + 2 else gradient[None]
        places = stratified_indices(math.prod(self.row_shape(activation)), limit, activation.device)
        rows, _ = self.im2row(activation, (places, None), None)
        own = batched.movedim(1, -1).reshape(-1, self.groups, batched.shape[1] // self.groups)
        own = own if places is None else own.index_select(0, places)
        return rows.unflatten(0, (-1, self.groups)), own

    def project(self, activation: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        """Apply a matrix (rank, features) to every row."""
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
        """Apply a matrix (outputs, rank) to every place."""
        points = matrix.reshape(*matrix.shape, *(1 for _ in self.kernel))
        return _CONVOLVE[len(self.kernel)](projected, points, groups=self.groups)

    def delta_weight(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the matrix in the layout of the weight."""
        return matrix.reshape(like.shape)

    def padding_of(self, activation: torch.Tensor) -> tuple[int, ...]:
        """Return the padding of an activation, two numbers an axis, the last axis first."""
        return self.padding

    def _padded(self, activation: torch.Tensor) -> torch.Tensor:
        padding = self.padding_of(activation)
        return F.pad(activation, padding, mode=self.mode) if any(padding) else activation

    def _steps(self) -> list[tuple[int, int]]:
        extents = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))
        return list(zip(extents, self.stride, strict=True))


@singledispatch
def view_of(module: nn.Module) -> LinearView | ConvView:
    """Return how a layer reads its input.

    A bridge that knows a class of convolutions with a forward of their own registers its reading:
    ``view_of.register(cls)(function)``.

    Raises
    ------
    LayerError
        If the layer is no matrix acting on rows, or a convolution that does more than convolve.
    """
    if isinstance(base := getattr(module, "base_layer", None), nn.Module):
        return view_of(base)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        raise LayerError(
            f"expected a layer that multiplies rows of its input, got {type(module).__name__}; "
            "leave it out of the targets"
        )
    return LinearView(transposed=type(module).__name__ == "Conv1D")


@view_of.register(nn.Conv1d)
@view_of.register(nn.Conv2d)
@view_of.register(nn.Conv3d)
def conv_view_of(module: Convolution) -> ConvView:
    """Return the patches of a convolution as torch computes it.

    Raises
    ------
    LayerError
        If its class computes it in a way of its own.
    """
    if type(module).forward not in _STOCK:
        # It may pad the input, or normalise the weight: an adapter would add something else.
        raise LayerError(
            f"expected a convolution that applies its weight as it is, got {type(module).__name__} "
            "with a forward of its own; leave it out of the targets"
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


def stratified_indices(count: int, limit: int | None, device: torch.device) -> torch.Tensor | None:
    """Return ``limit`` of ``count`` numbers, one drawn from each of as many equal stretches.

    Every number is expected equally often, so means over them are unbiased; where two stretches
    meet it may come twice. None: all are within the limit.
    """
    if limit is None or count <= limit:
        return None
    drawn = torch.arange(limit, dtype=torch.float64) + torch.rand(limit, dtype=torch.float64)
    return (drawn * (count / limit)).long().clamp(max=count - 1).to(device)


def input_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the activation among the arguments of a call, positional or by keyword.

    Raises
    ------
    ArrayTypeError
        If none is a floating tensor.
    """
    for value in (*args, *_in_order(module, kwargs)):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise ArrayTypeError(
        f"expected a floating tensor among the inputs of {type(module).__name__}, got none; "
        "leave the layer out of the targets"
    )


def _in_order(module: nn.Module, kwargs: Mapping[str, Any]) -> list[Any]:
    """Return keyword arguments in the order of the module's own signature."""
    if len(kwargs) < 2:
        return list(kwargs.values())
    own = [name for name in inspect.signature(module.forward).parameters if name in kwargs]
    return [kwargs[name] for name in (*own, *(name for name in kwargs if name not in own))]
