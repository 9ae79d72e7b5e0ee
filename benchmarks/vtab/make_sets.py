"""Make sets in the layout of VTAB-1k from packages: python -m benchmarks.vtab.make_sets FOLDER.

They do not belong to the benchmark, but are small labeled sets that need no separate download:
CIFAR-10 and MNIST from what packages carry, scikit-learn's digits, and drawn sprites, of which the
orientation is asked for, as in the benchmark's own dsprites_ori.
"""

import argparse
import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks import assets
from benchmarks.vtab.sets import TRAIN, VALIDATION

#: Test images of a set, at most.
TEST = 2000
ORIENTATIONS = 8

Labeled = list[tuple[Image.Image, int]]


def cifar10() -> Labeled:
    return [(Image.open(io.BytesIO(png)), label) for png, label in assets.cifar10()]


def mnist5k() -> Labeled:
    images, labels = assets.mnist()
    return [(Image.fromarray(one), int(c)) for one, c in zip(images, labels, strict=True)]


def digits() -> Labeled:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images * (255 / 16)).astype(np.uint8)
    return [(Image.fromarray(one), int(c)) for one, c in zip(images, found.target, strict=True)]


def sprites_ori() -> Labeled:
    """Draw 3,000 figures, each without symmetry, turned into one of 8 directions."""
    rng = np.random.default_rng(0)
    return [_sprite(rng, number % ORIENTATIONS) for number in range(TRAIN + VALIDATION + TEST)]


#: Corners in a unit square about the origin: an arrow, the letters L and P, a flag.
FIGURES = [
    [(-0.4, -0.15), (0.1, -0.15), (0.1, -0.4), (0.5, 0), (0.1, 0.4), (0.1, 0.15), (-0.4, 0.15)],
    [(-0.4, -0.4), (-0.1, -0.4), (-0.1, 0.2), (0.4, 0.2), (0.4, 0.45), (-0.4, 0.45)],
    [(-0.4, -0.5), (0.4, -0.5), (0.4, 0.1), (-0.15, 0.1), (-0.15, 0.5), (-0.4, 0.5)],
    [(-0.5, -0.5), (0.5, -0.2), (-0.3, 0.1), (-0.3, 0.5), (-0.5, 0.5)],
]


def _sprite(rng: np.random.Generator, label: int) -> tuple[Image.Image, int]:
    size, scale = 64, rng.uniform(16, 30)
    # Directions are blurred by a third of the way to the next one.
    angle = 2 * math.pi / ORIENTATIONS * (label + rng.uniform(-1 / 3, 1 / 3))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = np.array(FIGURES[rng.integers(len(FIGURES))]) @ turn.T * scale
    corners += rng.uniform(scale / 2 + 4, size - scale / 2 - 4, 2)
    ground, figure = rng.integers(0, 100, 3), rng.integers(130, 256, 3)
    image = Image.new("RGB", (size, size), tuple(map(int, ground)))
    outline = [(float(x), float(y)) for x, y in corners]
    ImageDraw.Draw(image).polygon(outline, fill=tuple(map(int, figure)))
    return image, label


SETS: dict[str, Callable[[], Labeled]] = {
    "cifar10": cifar10,
    "digits": digits,
    "mnist5k": mnist5k,
    "sprites_ori": sprites_ori,
}


def write(folder: Path, labeled: Labeled, seed: int = 0) -> None:
    """Write images and lists: 1,000 drawn at random to learn from, and up to 2,000 to test on."""
    order = np.random.default_rng(seed).permutation(len(labeled))
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for place in order[: TRAIN + VALIDATION + TEST]:
        image, label = labeled[place]
        image.save(images / f"{place:05d}.png")
        lines.append(f"images/{place:05d}.png {label}\n")
    (folder / "test.txt").write_text("".join(lines[TRAIN + VALIDATION :]))
    # Last: it is what makes the folder a set.
    (folder / "train800val200.txt").write_text("".join(lines[: TRAIN + VALIDATION]))


def main() -> int:
    """Make those that are not there; the exit status is the number that could not be made."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("folder", type=Path)
    data = parser.parse_args().folder
    failed = 0
    for name, labeled in SETS.items():
        if (data / name / "train800val200.txt").is_file():
            continue
        try:
            write(data / name, labeled())
            print(f"{name}: made")
        except assets.AssetError as error:
            print(f"{name}: left out, {error}")
            failed += 1
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
