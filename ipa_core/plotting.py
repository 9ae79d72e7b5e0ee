"""Pictures of projectors, on matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ipa_core._array import to_numpy
from ipa_core.errors import MissingDependencyError
from ipa_core.projector import Projector


def scree(projectors: Projector | Mapping[str, Projector]) -> Any:
    """Draw the share of the energy that each direction captures, and all up to it.

    Parameters
    ----------
    projectors : Projector or mapping of str to Projector
        A mapping gives one line a name.

    Returns
    -------
    matplotlib.figure.Figure
        Save it with ``figure.savefig(path)``.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import fit_projector
    >>> figure = scree(fit_projector(np.diag([3.0, 2.0, 1.0]), rank=2))
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['share of the energy', 'captured so far']
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "expected matplotlib to be installed, which draws; "
            "run pip install 'ipa-projectors[plot]'"
        ) from error
    named = {"": projectors} if isinstance(projectors, Projector) else projectors
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    each, summed = figure.subplots(1, 2)
    for name, projector in named.items():
        shares = to_numpy(projector.energies) / (projector.total_energy or 1.0)
        directions = range(1, projector.rank + 1)
        each.semilogy(directions, shares, marker=".", label=name)
        summed.plot(directions, shares.cumsum(), marker=".", label=name)
    each.set_ylabel("share of the energy")
    summed.set_ylabel("captured so far")
    summed.set_ylim(0, 1)
    for axes in (each, summed):
        axes.set_xlabel("direction")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if 1 < len(named) <= 12:
        figure.legend(
            *each.get_legend_handles_labels(), loc="outside right center", fontsize="small"
        )
    return figure
