"""Backbones with real weights, split so that frozen blocks run once per image."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmarks.vision  # noqa: F401  isort: skip  (before timm)
import timm
import torch
from torch import nn

from benchmarks import assets
from benchmarks.vtab.sets import VtabSet
from benchmarks.vtab.zero_shot import zero_shot_head
from ipa_timm import preprocess


@dataclass(frozen=True)
class Backbone:
    """A model for a set, the size of its images, and the first of its blocks with adapters."""

    make: Callable[[VtabSet], nn.Module]
    pixels: int
    first: int


#: Pixels of a side for the ViT: five by five patches.
VIT_PIXELS = 70


def saliency_vit(classes: int) -> nn.Module:
    """Return a ViT-S/14 that was DINOv2; without a head for no classes."""
    size = (3, VIT_PIXELS, VIT_PIXELS)
    return timm.create_model(
        "vit_small_patch14_dinov2",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(assets.saliency_vit()), "input_size": size},
        img_size=VIT_PIXELS,
        num_classes=classes,
    )


def efficientnet_lite0(data: VtabSet) -> nn.Module:
    """EfficientNet-Lite0 of ImageNet-1k."""
    model = timm.create_model(
        "tf_efficientnet_lite0", pretrained_cfg_overlay={"input_size": (3, 96, 96)}
    )
    theirs = torch.load(assets.efficientnet_lite0(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), theirs.values(), strict=True)))
    model.reset_classifier(data.classes)
    return model


#: The last blocks only, and small images: what one thread can train many times within an hour.
BACKBONES = {
    "saliency-vit-s": Backbone(lambda data: saliency_vit(data.classes), VIT_PIXELS, first=8),
    "efficientnet-lite0": Backbone(efficientnet_lite0, pixels=96, first=4),
}


def backbone(name: str, weights: Path | None, text: Path | None) -> Backbone:
    """Return one of the above; or any model of timm with ``blocks``, all of them adapted.

    Its weights are in a file. With a folder ``text`` the head is a zero-shot one.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    config = timm.get_pretrained_cfg(name)
    if config is None or weights is None:
        raise SystemExit(
            f"expected a backbone among {list(BACKBONES)}, or a model of timm with --weights, got "
            f"{name!r}"
        )

    def make(data: VtabSet) -> nn.Module:
        model = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={"file": str(weights)},
            num_classes=0 if text else data.classes,
        )
        if text:
            model.head = zero_shot_head(text, data)
        return model

    return Backbone(make, pixels=config.input_size[-1], first=0)


class _Reached(Exception):
    """The pass has come to the first block that is not frozen."""


@torch.no_grad()
def before(model: nn.Module, images: torch.Tensor, first: int) -> torch.Tensor:
    """Return the input of block ``first``: what images are turned into by all that is frozen."""
    found: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Reached

    handle = model.blocks[first].register_forward_pre_hook(stop)
    try:
        model.eval()(preprocess(model, images))
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def after(model: nn.Module, x: torch.Tensor, first: int) -> torch.Tensor:
    """Return the outputs that belong to the input of block ``first``."""
    for block in model.blocks[first:]:
        x = block(x)
    for name in ("norm", "conv_head", "bn2"):
        if hasattr(model, name):
            x = getattr(model, name)(x)
    return model.forward_head(x)
