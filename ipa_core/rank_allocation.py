"""Allocation of a total rank to the layers of a model."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from ipa_core import settings
from ipa_core._array import Array, host_values
from ipa_core.errors import RankError, with_context


def allocate_ranks(
    spectra: Mapping[str, Array | Sequence[float]],
    budget: int,
    *,
    floor: int = 1,
    cap: int | None = None,
) -> dict[str, int]:
    """Allocate a total rank to layers by marginal captured energy.

    Every layer gets ``floor``; then the layer whose next direction captures most energy gets one
    more, until the budget is spent. For decreasing spectra this captures the most energy.

    Parameters
    ----------
    spectra : mapping of str to array or sequence of float
        Energies of the directions of each layer, decreasing. Pass shares
        (``projector.energies / projector.total_energy``) to give layers of small and of large
        activations equal weight.
    budget : int
        Sum of the ranks.
    floor, cap : int, optional
        Least and largest rank of a layer; by default 1 and the length of its spectrum.

    Returns
    -------
    dict of str to int
        Ranks that sum to the budget, in the order of ``spectra``.

    Raises
    ------
    RankError
        If the budget is below the sum of the floors or above the sum of the caps, or an argument is
        not valid; the message has the layer's name.

    Notes
    -----
    Cost O(budget log layers). Ties go to the first layer.

    Examples
    --------
    >>> from ipa_core import allocate_ranks
    >>> allocate_ranks({"q": [9, 1, 0], "up": [8, 7, 6]}, budget=4)
    {'q': 1, 'up': 3}
    """
    if not isinstance(spectra, Mapping):
        raise RankError(f"expected a mapping from layer names, got {type(spectra).__name__}")
    energies = {name: _energies(name, spectrum) for name, spectrum in spectra.items()}
    budget = settings.integer("budget", budget, least=0, error=RankError)
    floor = settings.integer("floor", floor, least=0, error=RankError)
    if cap is not None:
        cap = settings.integer("cap", cap, least=1, error=RankError)
    limits = {name: min(len(values), cap or len(values)) for name, values in energies.items()}
    ranks = {name: min(floor, limit) for name, limit in limits.items()}
    least, most = sum(ranks.values()), sum(limits.values())
    if not least <= budget <= most:
        raise RankError(
            f"expected a budget between {least} and {most}, the sums of floors and caps, "
            f"got {budget}"
        )
    order = {name: index for index, name in enumerate(spectra)}
    queue = [
        (-energies[name][rank], order[name], name)
        for name, rank in ranks.items()
        if rank < limits[name]
    ]
    heapq.heapify(queue)
    for _ in range(budget - least):
        _, index, name = heapq.heappop(queue)
        ranks[name] += 1
        if ranks[name] < limits[name]:
            heapq.heappush(queue, (-energies[name][ranks[name]], index, name))
    return ranks


def _energies(name: str, spectrum: Array | Sequence[float]) -> list[float]:
    """Return a spectrum as finite floats."""
    try:
        values = host_values(spectrum)
        return [settings.number("energy", value, error=RankError) for value in values]
    except (TypeError, ValueError, RuntimeError) as error:
        cause = (
            error
            if isinstance(error, RankError)
            else RankError(
                f"expected the energies of directions, got {type(spectrum).__name__}; "
                "pass projector.energies"
            )
        )
        raise with_context(cause, f"layer {name!r}") from error
