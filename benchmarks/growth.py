"""Growth of the cost of learning with rows, features, rank and layers.

    python -m benchmarks.growth [--quick]

One quantity doubles at a time, the others stay; the slope of time over it on doubly logarithmic
axes is 1 where cost is linear. One thread; the median of several runs, the sizes taking turns.
A whole run draws docs/figures/growth.svg, too.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from benchmarks import record
from benchmarks.learners import decaying
from benchmarks.timing import Action, interleaved, medians
from ipa_core import RandomizedSVD
from ipa_torch import fit_projectors

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "growth.svg"
# Text stays text, and the same results give the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "growth", "font.size": 9}
TICKS = (0.1, 0.2, 0.5, 1, 2)
PACKAGES = ["ipa-projectors", "numpy", "torch"]
Growth = dict[str, Any]  # the seconds by size, and their slope


def learn(pool: list[np.ndarray], count: int, rank: int) -> Action:
    def go() -> None:
        learner = RandomizedSVD(rank)
        for number in range(count):
            learner.update(pool[number % len(pool)])
        learner.finalize()

    return go


def learn_layers(count: int, batches: list[torch.Tensor]) -> Action:
    """Learn over a chain of layers; what the model itself does is linear in them, too."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(count)))
    return lambda: fit_projectors(model, batches, 16, progress=False)


def cases(quick: bool) -> dict[str, dict[int, Action]]:
    steps, wide = range(3 if quick else 4), decaying(1024, 2048, 2)
    batches = [torch.randn(1024, 512) for _ in range(8)]
    return {
        "rows": {2048 * n: learn(wide, n, 16) for n in (32 << s for s in steps)},
        "features": {d: learn(decaying(d, 2048, 2), 32, 16) for d in (1024 << s for s in steps)},
        "rank": {r: learn(wide, 64, r) for r in (16 << s for s in steps)},
        "layers": {n: learn_layers(n, batches) for n in (4 << s for s in steps)},
    }


def measure(sizes: dict[int, Action], repeats: int) -> Growth:
    times = medians(interleaved({str(size): action for size, action in sizes.items()}, repeats))
    logs = [(math.log(int(size)), math.log(value)) for size, value in times.items()]
    slope, _ = np.polyfit(*zip(*logs, strict=True), 1)
    return {"seconds": times, "slope": float(slope)}


def draw(growth: dict[str, Growth]) -> Figure:
    """Draw time over each quantity, beside a line of slope 1 through the largest."""
    figure, axes = plt.subplots(1, len(growth), figsize=(9, 2.4), layout="constrained", sharey=True)
    for place, (name, found) in zip(axes, growth.items(), strict=True):
        sizes = [int(size) for size in found["seconds"]]
        times = list(found["seconds"].values())
        linear = [times[-1] * size / sizes[-1] for size in sizes]
        place.plot(sizes, linear, color="0.7", linewidth=0.8, label="linear")
        place.plot(sizes, times, "o-", color="#0072b2", markersize=4)
        place.set(xscale="log", yscale="log", xlabel=name, title=f"slope {found['slope']:.2f}")
        place.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
        place.minorticks_off()
        place.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(TICKS, map(str, TICKS))
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    return figure


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
    if not quick:
        with plt.rc_context(STYLE):
            draw(results).savefig(FIGURE, metadata={"Date": None})
        print(f"written to {FIGURE}")


if __name__ == "__main__":
    main()
