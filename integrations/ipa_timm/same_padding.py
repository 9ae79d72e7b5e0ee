"""How timm's convolutions with TensorFlow's padding read their input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import Conv2dSame

from ipa_torch._layers.matmul_view import ConvView, view_of


@dataclass(frozen=True)
class SamePaddingView(ConvView):
    """Patches of an input that is padded so that a stride of s leaves one place in s.

    How much that takes depends on the size of the image; an odd rest goes to the right and below.
    """

    def padding_of(self, activation: torch.Tensor) -> tuple[int, ...]:
        """Return the padding of an activation, two numbers an axis, the last axis first."""
        sizes = activation.shape[-len(self.kernel) :]
        padding: list[int] = []
        for size, (extent, step) in zip(sizes, self._steps(), strict=True):
            whole = max((-(-size // step) - 1) * step + extent - size, 0)
            padding = [whole // 2, whole - whole // 2, *padding]
        return tuple(padding)


@view_of.register(Conv2dSame)
def same_padding_view_of(module: Conv2dSame) -> SamePaddingView:
    """Return the patches of a convolution that pads its input itself."""
    return SamePaddingView(
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        dilation=tuple(module.dilation),
        groups=module.groups,
        padding=(),
        mode="constant",
    )
