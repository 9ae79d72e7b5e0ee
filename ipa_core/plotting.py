"""Plots of projectors (matplotlib, the extra ``plot``)."""

from __future__ import annotations

import math
import reprlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ipa_core._array import to_numpy
from ipa_core.errors import ArrayTypeError, ShapeError
from ipa_core.metrics import principal_angles
from ipa_core.optional_dependencies import import_optional
from ipa_core.projector import Projector


def scree(projectors: Projector | Mapping[str, Projector]) -> Any:
    """Plot the share of the energy of each direction, and its cumulative sum.

    Parameters
    ----------
    projectors : Projector or mapping of str to Projector
        A mapping gives a line for each name.

    Returns
    -------
    matplotlib.figure.Figure
        Save it with ``figure.savefig(path)``.

    Raises
    ------
    ArrayTypeError
        If these are not projectors.
    MissingDependencyError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import fit_projector
    >>> figure = scree(fit_projector(np.diag([3.0, 2.0, 1.0]), rank=2))
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['share of the energy', 'cumulative share']
    """
    named = {"": projectors} if isinstance(projectors, Projector) else _named(projectors)
    figure = _figure(9, 3.6)
    single, cumulative = figure.subplots(1, 2)
    for name, projector in named.items():
        shares = to_numpy(projector.energies) / (projector.total_energy or 1.0)
        directions = range(1, projector.rank + 1)
        single.semilogy(directions, shares, marker=".", label=name)
        cumulative.plot(directions, shares.cumsum(), marker=".", label=name)
    single.set_ylabel("share of the energy")
    cumulative.set_ylabel("cumulative share")
    cumulative.set_ylim(0, 1)
    for axes in (single, cumulative):
        axes.set_xlabel("direction")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _style(axes)
    if 1 < len(named) <= 12:
        figure.legend(
            *single.get_legend_handles_labels(), loc="outside right center", fontsize="small"
        )
    return figure


def captured(projectors: Mapping[str, Projector]) -> Any:
    """Plot the captured energy of each layer against the rank, as a heat map.

    Parameters
    ----------
    projectors : mapping of str to Projector
        By layer name, as from `ipa_torch.fit_projectors`.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ArrayTypeError
        If these are not projectors.
    MissingDependencyError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import fit_projector
    >>> wide, narrow = np.diag([3.0, 2.0, 1.0]), np.diag([3.0, 0.1])
    >>> figure = captured({"up": fit_projector(wide, 2), "down": fit_projector(narrow, 1)})
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['up', 'down']
    """
    named = _named(projectors)
    figure = _figure(7, 1.2 + 0.22 * len(named))
    axes = figure.subplots()
    most = max(projector.rank for projector in named.values())
    shares = [
        (to_numpy(p.energies) / (p.total_energy or 1.0)).cumsum().tolist()
        + [math.nan] * (most - p.rank)
        for p in named.values()
    ]
    image = axes.imshow(
        shares, vmin=0, vmax=1, aspect="auto", extent=(0.5, most + 0.5, len(shares) - 0.5, -0.5)
    )
    axes.set_yticks(range(len(shares)), list(named), fontsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("rank")
    figure.colorbar(image, ax=axes, label="captured energy")
    return figure


def angles(projectors: Mapping[str, Projector]) -> Any:
    """Plot the mean principal angle of every pair of projectors, in degrees, as a heat map.

    0: the smaller span lies in the larger span; 90: the spans are orthogonal. Pairs of different
    features are left blank.

    Parameters
    ----------
    projectors : mapping of str to Projector

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.

    Notes
    -----
    Cost: two small SVDs for each pair.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import fit_projector
    >>> q, k = fit_projector(np.eye(4)[:2], 2), fit_projector(np.eye(4)[2:], 2)
    >>> figure = angles({"q": q, "k": k})
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['0', '90', '90', '0']
    """
    named = _named(projectors)
    values = [[_angle(a, b) for b in named.values()] for a in named.values()]
    return heat_map(values, list(named), label="mean principal angle (degrees)", limits=(0, 90))


def heat_map(
    values: Sequence[Sequence[float]],
    names: Sequence[str],
    *,
    label: str = "cosine",
    limits: tuple[float, float] = (0, 1),
) -> Any:
    """Plot a matrix of pairwise similarities, for example of adapters of several tasks.

    Parameters
    ----------
    values : square, of n x n numbers
        NaN is left blank.
    names : sequence of n str
    label : str, default "cosine"
        Label of the color bar.
    limits : pair of float, default (0, 1)
        Ends of the color scale.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ShapeError
        If the values are not n x n for n names.
    MissingDependencyError
        If matplotlib is not installed.

    Examples
    --------
    >>> figure = heat_map([[1.0, 0.25], [0.25, 1.0]], ["task", "other task"])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['1', '0.25', '0.25', '1']
    """
    count = len(names)
    if [len(row) for row in values] != [count] * count:
        raise ShapeError(
            f"expected {count} x {count} values for {count} names, got rows of "
            f"{[len(row) for row in values]}"
        )
    figure = _figure(2.4 + 0.4 * count, 1.6 + 0.4 * count)
    axes = figure.subplots()
    image = axes.imshow(values, vmin=limits[0], vmax=limits[1])
    axes.set_xticks(range(count), names, rotation=90, fontsize=7)
    axes.set_yticks(range(count), names, fontsize=7)
    if count <= 12:
        middle = sum(limits) / 2
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    color = "white" if value < middle else "black"
                    text = f"{value:.2f}".rstrip("0").rstrip(".")
                    axes.text(j, i, text, ha="center", va="center", c=color, fontsize=7)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def trade_off(runs: Mapping[str, tuple[int, Sequence[float]]]) -> Any:
    """Plot accuracy against the number of trained parameters, with the deviation over seeds.

    Parameters
    ----------
    runs : mapping of str to (int, sequence of float)
        By method: the number of trained parameters, and the accuracy of each seed.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.

    Examples
    --------
    >>> figure = trade_off({"LoRA": (2000, [80.1, 80.9]), "IPA, frozen": (1000, [79.8, 81.0])})
    >>> figure.axes[0].get_xlabel()
    'trained parameters'
    """
    figure = _figure(6, 4)
    axes = figure.subplots()
    for name, (parameters, accuracies) in runs.items():
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        axes.errorbar(
            parameters, statistics.fmean(accuracies), spread, fmt="o", capsize=3, label=name
        )
    axes.set(xscale="log", xlabel="trained parameters", ylabel="accuracy, mean and deviation")
    _style(axes)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def _named(projectors: Any) -> Mapping[str, Projector]:
    """Return a mapping from names to projectors, if it is one and not empty."""
    if isinstance(projectors, Mapping) and projectors:
        if all(isinstance(projector, Projector) for projector in projectors.values()):
            return projectors
    raise ArrayTypeError(
        f"expected a mapping from names to projectors, got {reprlib.repr(projectors)}"
    )


def _angle(first: Projector, second: Projector) -> float:
    if first.features != second.features:
        return math.nan
    mean = to_numpy(principal_angles(first, second)).mean()
    return float(abs(math.degrees(mean)))


def _figure(width: float, height: float) -> Any:
    figure = import_optional("matplotlib.figure", extra="plot", user="ipa_core.plotting")
    return figure.Figure(figsize=(width, height), layout="constrained")


def _style(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
