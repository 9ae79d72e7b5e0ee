"""Small images for a ViT-S that was DINOv2; the feature is the class token at the end."""

from collections.abc import Callable

import benchmarks.vision  # noqa: F401  isort: skip  (before timm)
import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.evidence.cutting import TOLERANCE, Batch
from benchmarks.evidence.labeled import Labeled
from benchmarks.evidence.task import Example, run
from benchmarks.vtab.make_sets import SETS
from benchmarks.vtab.make_sets import Labeled as Rows
from benchmarks.vtab.models import VIT_PIXELS, before, saliency_vit
from benchmarks.vtab.sets import squared
from ipa_timm import preprocess

#: Training images of a seed, validation images, test images; what is left is the pool.
SIZES = {"cifar10": (2000, 1000, 4000), "mnist5k": (1500, 500, 2500)}


class Upper(nn.Module):
    """The upper blocks of a ViT and its last norm, called as transformers' encoders are."""

    def __init__(self, blocks: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks
        self.norm = norm

    def forward(self, inputs_embeds: torch.Tensor, **_: torch.Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.norm(self.blocks(inputs_embeds)))


class ImageTask(Labeled):
    """Classification of a set of images.

    Parameters
    ----------
    name : str
        Of `SIZES`, if no rows are given.
    adapted : int
        How many of the upper blocks are adapted.
    rows, make, sizes : optional
        Other images with labels, another ViT of timm, other sizes.
    """

    def __init__(
        self,
        name: str,
        *,
        adapted: int = 4,
        rows: Rows | None = None,
        make: Callable[[], nn.Module] | None = None,
        sizes: tuple[int, int, int] | None = None,
    ) -> None:
        rows = SETS[name]() if rows is None else rows
        order = np.random.default_rng(0).permutation(len(rows))
        vit = (saliency_vit(0) if make is None else make()).eval()
        vit.requires_grad_(False)
        first = len(vit.blocks) - adapted
        body = Upper(vit.blocks[first:], vit.norm)
        examples = []
        for start in range(0, len(order), 100):
            some = [rows[place] for place in order[start : start + 100]]
            pixels = np.stack([squared(image, VIT_PIXELS) for image, _ in some])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            hidden = before(vit, images, first)
            if start == 0:
                _check(vit, images, body, hidden)
            examples += [
                Example(x.clone(), torch.tensor(label))
                for x, (_, label) in zip(hidden, some, strict=True)
            ]
        super().__init__(name, examples, sizes or SIZES[name], body, class_token)


def class_token(body: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the class token after the last norm, shape (batch, width)."""
    return run(body, batch)[:, 0]


@torch.no_grad()
def _check(vit: nn.Module, images: torch.Tensor, body: nn.Module, hidden: torch.Tensor) -> None:
    """Check that the class token of the upper blocks is what the whole model makes of images."""
    whole = vit(preprocess(vit, images))
    difference = (body(hidden).last_hidden_state[:, 0] - whole).abs().max() / whole.abs().max()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"expected a ViT whose features are its class token, got a relative difference of "
            f"{float(difference):.1e}"
        )
