"""Data sets in the layout of VTAB-1k: a folder each, with lists of "path label" lines."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

TRAIN, VALIDATION = 800, 200

#: The 19 sets of the benchmark by their usual folder names.
GROUPS = {
    "natural": [
        "cifar",
        "caltech101",
        "dtd",
        "oxford_flowers102",
        "oxford_iiit_pet",
        "svhn",
        "sun397",
    ],
    "specialized": ["patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"],
    "structured": [
        "clevr_count",
        "clevr_dist",
        "dmlab",
        "kitti",
        "dsprites_loc",
        "dsprites_ori",
        "smallnorb_azi",
        "smallnorb_ele",
    ],
}


class LayoutError(RuntimeError):
    """A folder is no set in the layout of VTAB-1k."""


@dataclass(frozen=True)
class Split:
    """Images by their paths, and their labels."""

    paths: list[Path]
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, size: int, pixels: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (images, labels), the images as bytes of ``pixels`` a side, in order."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            images = np.stack([_read(path, pixels) for path in self.paths[part]])
            yield torch.from_numpy(images).permute(0, 3, 1, 2), self.labels[part]


@dataclass(frozen=True)
class VtabSet:
    """The 800 + 200 images of a set, and its test images."""

    name: str
    folder: Path
    train: Split
    validation: Split
    test: Split

    @property
    def classes(self) -> int:
        """Number of classes, by the labels of training, validation and test."""
        parts = (self.train, self.validation, self.test)
        return 1 + max(int(part.labels.max()) for part in parts)


def present(data: Path) -> list[str]:
    """Return the sets in a folder: those of the benchmark in its order, then others by name."""
    found = {path.parent.name for path in data.glob("*/train800val200.txt")}
    known = [name for group in GROUPS.values() for name in group]
    return [name for name in known if name in found] + sorted(found - set(known))


def absent(data: Path) -> list[str]:
    """Return the sets of the benchmark that a folder does not have."""
    found = set(present(data))
    return [name for group in GROUPS.values() for name in group if name not in found]


def read(data: Path, name: str) -> VtabSet:
    """Read the lists of a set: the first 800 lines are for training, the last 200 for validation.

    Raises
    ------
    LayoutError
        If a list is missing, has other lines or another length.
    """
    folder = data / name
    both = _split(folder, "train800val200.txt")
    if len(both) != TRAIN + VALIDATION:
        raise LayoutError(
            f"{folder}: expected {TRAIN + VALIDATION} lines in train800val200.txt, got {len(both)}"
        )
    train, validation = (
        Split(both.paths[part], both.labels[part]) for part in (slice(TRAIN), slice(TRAIN, None))
    )
    return VtabSet(name, folder, train, validation, _split(folder, "test.txt"))


def _split(folder: Path, file: str) -> Split:
    path = folder / file
    if not path.is_file():
        raise LayoutError(f"{folder}: expected a file {file}, got none")
    rows = [line.rsplit(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows or not all(len(row) == 2 and row[1].isdigit() for row in rows):
        raise LayoutError(f"{path}: expected lines 'path label'")
    return Split([folder / name for name, _ in rows], torch.tensor([int(c) for _, c in rows]))


def squared(image: Image.Image, pixels: int) -> np.ndarray:
    """Return an image as bytes (pixels, pixels, 3)."""
    whole = image.convert("RGB").resize((pixels, pixels), Image.Resampling.BICUBIC)
    return np.asarray(whole)


def _read(path: Path, pixels: int) -> np.ndarray:
    with Image.open(path) as image:
        return squared(image, pixels)
