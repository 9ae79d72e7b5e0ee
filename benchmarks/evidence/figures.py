"""The figures of the documentation: python -m benchmarks.evidence.figures.

In the style of the paper's, from the results files; those that are not there are passed over.
"""

import argparse
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.evidence.cells import FOLDER, Cell, read  # noqa: E402
from benchmarks.evidence.likelihood_curves import MAIN_RANK, MAIN_STEPS, curve_cells  # noqa: E402
from benchmarks.evidence.likelihood_methods import LIKELIHOOD  # noqa: E402
from benchmarks.evidence.likelihood_tables import nats, tested_cells  # noqa: E402
from benchmarks.evidence.methods import COMPARED, Method  # noqa: E402
from benchmarks.evidence.statistics import mean_and_deviation, of_method  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "figures"
COLORS = {
    "LoRA": "#0072b2",
    "IPA, frozen": "#e69f00",
    "IPA without first token, frozen": "#e69f00",
    "IPA, trainable": "#009e73",
    "random A, frozen": "#999999",
    "damped gradient, frozen": "#d55e00",
}
NATS = "nats per token of test texts"
# Text stays text, and the same results give the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "evidence", "font.size": 9}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DOCS, help="folder to write")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    cells = [cell for path in sorted(FOLDER.glob("*.jsonl")) for cell in read(path)]
    similarity = FOLDER / "similarity.json"
    found = json.loads(similarity.read_text()) if similarity.is_file() else {}
    swept = {cell.task for cell in cells if cell.study in ("rank", "share")}
    drawings: dict[str, tuple[Callable[[Any], Figure], Any]] = {
        "methods": (methods, [cell for cell in cells if cell.study == "main"]),
        "likelihood": (likelihood, tested_cells(cells)),
        "likelihood_curves": (likelihood_curves, curve_cells(cells)),
        "rank_and_share": (rank_and_share, [cell for cell in cells if cell.task in swept]),
        "likeness": (likeness, found),
        "before_and_after": (before_and_after, found),
    }
    for name, (draw, data) in drawings.items():
        if not data:
            print(f"{name}: no results")
            continue
        with plt.rc_context(STYLE):
            figure = draw(data)
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
        print(f"written to {out / name}.svg")
    return 0


def methods(cells: Sequence[Cell]) -> Figure:
    """Draw the accuracy of each method on each task: the paper's figure 3."""
    return _dots(cells, COMPARED, lambda cell: cell.accuracy, "test accuracy (%)")


def likelihood(cells: Sequence[Cell]) -> Figure:
    """Draw the nats per token of each method on each kind of text."""
    return _dots(cells, LIKELIHOOD, nats, NATS)


def likelihood_curves(cells: Sequence[Cell]) -> Figure:
    """Draw nats per token over training steps, and over trained parameters."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained", sharey=True)
    longer = [cell for cell in cells if cell.rank == MAIN_RANK]
    _curves(axes[0], longer, "steps", f"training steps, rank {MAIN_RANK}", nats, NATS)
    steps = sorted({cell.steps for cell in longer})
    axes[0].set_xticks(steps, map(str, steps))
    axes[0].minorticks_off()
    wider = [cell for cell in cells if cell.steps == MAIN_STEPS]
    _curves(axes[1], wider, "trainable", f"trained parameters, {MAIN_STEPS} steps", nats, NATS)
    return figure


def _dots(
    cells: Sequence[Cell],
    known: Mapping[str, Method],
    measured: Callable[[Cell], float],
    label: str,
) -> Figure:
    """Draw a dot for each seed, and the mean with its standard error for each method."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    names = [name for name in reversed(known) if of_method(cells, name)]
    columns = min(len(tasks), 3)
    lines = -(-len(tasks) // columns)
    size = (3.2 * columns + 1.5, (0.26 * len(names) + 1) * lines)
    figure, axes = plt.subplots(
        lines, columns, figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    for place in axes.flat[len(tasks) :]:
        place.remove()
    for place, task in zip(axes.flat, tasks, strict=False):
        of_task = [cell for cell in cells if cell.task == task]
        for height, name in enumerate(names):
            values = [measured(cell) for cell in of_method(of_task, name)]
            if not values:
                continue
            trained = known[name].trainable
            color = "#0072b2" if trained else "#e69f00"
            place.plot(values, [height] * len(values), ".", color=color, alpha=0.4)
            mean, deviation = mean_and_deviation(values)
            error = deviation / len(values) ** 0.5
            mark = "o" if trained else "s"
            place.errorbar(mean, height, xerr=error, fmt=mark, color=color, capsize=3)
        lora = [measured(cell) for cell in of_method(of_task, "LoRA")]
        if lora:
            place.axvline(mean_and_deviation(lora)[0], color="0.7", linewidth=0.8, zorder=0)
        title = textwrap.fill(task, 24)
        place.set(title=title, xlabel=label, yticks=range(len(names)))
        place.set_yticklabels(names)
        _tidy(place, "x")
    return figure


def rank_and_share(cells: Sequence[Cell]) -> Figure:
    """Draw accuracy against rank, and against the texts P is learned from: the paper's figure 4."""
    swept = sorted({(cell.study, cell.task) for cell in cells if cell.study in ("rank", "share")})
    size = (4 * len(swept), 3)
    figure, axes = plt.subplots(1, len(swept), figsize=size, layout="constrained", squeeze=False)
    for place, (study, task) in zip(axes[0], swept, strict=True):
        own = [cell for cell in cells if cell.task == task]
        if study == "rank":
            at_rank = [cell for cell in own if cell.study in ("rank", "main")]
            _curves(place, at_rank, "rank", f"{task}: rank")
        else:
            shares = [cell for cell in own if cell.study == "share"]
            _curves(place, shares, "learn_from", f"{task}: texts that P saw")
    return figure


def likeness(found: dict[str, Any]) -> Figure:
    """Draw cosines of A, of B and of updates between trained adapters: the paper's figure 1."""
    names = found["adapters"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", sharey=True)
    for place, (key, title) in zip(
        axes, {"a": "A", "b": "B", "update": "update B A"}.items(), strict=True
    ):
        image = place.imshow(found[key], vmin=0, vmax=1, cmap="viridis")
        place.set(title=title, xticks=[], yticks=range(len(names)))  # columns as rows
        place.set_yticklabels(names)
    figure.colorbar(image, ax=axes, label="cosine, mean over layers", shrink=0.8)
    return figure


def before_and_after(found: dict[str, Any]) -> Figure:
    """Draw the similarity of A and of A x before and after fine-tuning: the paper's figure 5."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for place, (key, title) in zip(
        axes,
        {
            "a_before_and_after": "cosine of A",
            "features_before_and_after": "similarity of A x (linear CKA)",
        }.items(),
        strict=True,
    ):
        for task, values in found[key].items():
            place.plot(list(values.values()), ".-", label=task, linewidth=0.8)
        place.set(title=title, xlabel="adapted layer", ylim=(0, 1.02))
        _tidy(place, "y")
    axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes[0].set_ylabel("before to after")
    return figure


def _curves(
    place: Axes,
    cells: Sequence[Cell],
    varied: str,
    title: str,
    measured: Callable[[Cell], float] = lambda cell: cell.accuracy,
    label: str = "test accuracy (%)",
) -> None:
    for name, color in COLORS.items():
        steps = sorted({getattr(c, varied) for c in of_method(cells, name)})
        if len(steps) < 2:
            continue
        points = [
            mean_and_deviation(
                [measured(c) for c in of_method(cells, name) if getattr(c, varied) == step]
            )
            for step in steps
        ]
        means, deviations = zip(*points, strict=True)
        place.errorbar(
            steps, means, deviations, fmt="o-", color=color, label=name, capsize=3, markersize=4
        )
    place.set(xscale="log", xlabel=title, ylabel=label)
    if place.has_data():
        place.legend(frameon=False)
    _tidy(place, "y")


def _tidy(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.9")
    axes.set_axisbelow(True)


if __name__ == "__main__":
    raise SystemExit(main())
