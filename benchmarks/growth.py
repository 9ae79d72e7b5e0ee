"""How the cost of learning grows with rows, features, rank and layers.

    python -m benchmarks.growth [--quick]

One quantity doubles at a time, the others stay; the slope of time over it on doubly logarithmic
axes is 1 where cost is linear. One thread; the median of several runs, the sizes taking turns.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from benchmarks import record
from benchmarks.learners import decaying
from ipa_core import RandomizedSVD
from ipa_torch import fit_projectors

PACKAGES = ["ipa-projectors", "numpy", "torch"]


def learn(pool: list[np.ndarray], count: int, rank: int) -> Callable[[], object]:
    def go() -> None:
        learner = RandomizedSVD(rank)
        for number in range(count):
            learner.update(pool[number % len(pool)])
        learner.finalize()

    return go


def learn_layers(count: int, batches: list[torch.Tensor]) -> Callable[[], object]:
    """Learn over a chain of layers; what the model itself does is linear in them, too."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(count)))
    return lambda: fit_projectors(model, batches, 16, progress=False)


def cases(quick: bool) -> dict[str, dict[int, Callable[[], object]]]:
    steps, wide = range(3 if quick else 4), decaying(1024, 2048, 2)
    batches = [torch.randn(1024, 512) for _ in range(8)]
    return {
        "rows": {2048 * n: learn(wide, n, 16) for n in (32 << s for s in steps)},
        "features": {d: learn(decaying(d, 2048, 2), 32, 16) for d in (1024 << s for s in steps)},
        "rank": {r: learn(wide, 64, r) for r in (16 << s for s in steps)},
        "layers": {n: learn_layers(n, batches) for n in (4 << s for s in steps)},
    }


def measure(sizes: dict[int, Callable[[], object]], repeats: int) -> dict[str, object]:
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size, action in sizes.items():
            start = time.perf_counter()
            action()
            times[size].append(time.perf_counter() - start)
    medians = {size: statistics.median(values) for size, values in times.items()}
    logs = [(math.log(size), math.log(value)) for size, value in medians.items()]
    slope, _ = np.polyfit(*zip(*logs, strict=True), 1)
    return {"seconds": medians, "slope": float(slope)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three sizes, once")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    results = {}
    with threadpool_limits(1):
        for name, sizes in cases(quick).items():
            results[name] = measure(sizes, 1 if quick else 5)
            print(name, results[name], flush=True)
    record.write("growth", quick, PACKAGES, {"threads": 1, "growth": results})


if __name__ == "__main__":
    main()
