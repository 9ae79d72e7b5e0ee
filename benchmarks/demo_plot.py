"""The demo's picture: how much of each layer's input P keeps, and accuracy against parameters."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.demo_task import Run  # noqa: E402
from ipa_torch import LayerProjectors  # noqa: E402

# The four different inputs of a block: query, key and value see the same one.
INPUTS: Mapping[str, str] = {
    "attention.self.query": "query, key, value",
    "attention.output.dense": "attention output",
    "intermediate.dense": "up",
    "output.dense": "down",
}
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
MARKERS = ("o", "s", "^", "D")


def plot(projectors: LayerProjectors, runs: Sequence[Run], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _captured(left, projectors)
    _accuracy(right, runs)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _captured(axes: Axes, projectors: LayerProjectors) -> None:
    for (suffix, label), color, marker in zip(INPUTS.items(), COLORS, MARKERS, strict=True):
        shares = [
            100 * projector.captured()
            for name, projector in projectors.items()
            if name.split(".", 3)[-1] == suffix  # encoder.layer.N.SUFFIX
        ]
        blocks = range(1, len(shares) + 1)
        axes.plot(blocks, shares, color=color, marker=marker, markersize=5, label=label)
    rank = next(iter(projectors.values())).rank
    axes.set(
        title=f"Energy of the layers' inputs that {rank} directions keep",
        xlabel="block",
        ylabel="captured energy (%)",
        ylim=(0, 100),
    )
    axes.legend(title="linear layer", frameon=False, ncols=2)
    _tidy(axes)


def _accuracy(axes: Axes, runs: Sequence[Run]) -> None:
    for run, color, marker in zip(runs, COLORS, MARKERS, strict=True):
        equal = [other.method for other in runs if other.trainable == run.trainable]
        aside = 4 * (equal.index(run.method) - (len(equal) - 1) / 2)  # so that bars do not overlap
        axes.errorbar(
            run.trainable / 1000 + aside,
            100 * run.accuracy,
            100 * run.standard_error,
            color=color,
            marker=marker,
            markersize=7,
            capsize=4,
            linestyle="none",
            label=run.method,
        )
    axes.set(
        title="Sentiment after fine-tuning, one run each",
        xlabel="trainable parameters (thousands)",
        ylabel="test accuracy (%), ± 1 standard error",
    )
    axes.set_xlim(0, 1.15 * max(run.trainable for run in runs) / 1000)
    axes.margins(y=0.3)
    axes.legend(frameon=False, loc="best")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
