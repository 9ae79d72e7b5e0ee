"""Matmul view of timm's `Conv2dSame`, a convolution with TensorFlow's SAME padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import Conv2dSame

from ipa_torch.extension import ConvView, view_of


@dataclass(frozen=True)
class SamePaddingView(ConvView):
    """View of a convolution padded so that its output has ceil(size / stride) positions.

    The padding depends on the image size; an odd total puts the extra pixel right and below.
    """

    def padding_of(self, activation: torch.Tensor) -> tuple[int, ...]:
        """Return the padding of an activation, two numbers per axis, last axis first."""
        sizes = activation.shape[-len(self.kernel) :]
        padding: list[int] = []
        for size, (extent, step) in zip(sizes, self._steps(), strict=True):
            total = max((-(-size // step) - 1) * step + extent - size, 0)
            padding = [total // 2, total - total // 2, *padding]
        return tuple(padding)


@view_of.register(Conv2dSame)
def same_padding_view_of(module: Conv2dSame) -> SamePaddingView:
    """Return the view of a convolution that computes its padding at run time."""
    return SamePaddingView(
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        dilation=tuple(module.dilation),
        groups=module.groups,
        padding=(),
        mode="constant",
    )
