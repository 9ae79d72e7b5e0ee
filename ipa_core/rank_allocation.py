"""Allocation of a total rank to the layers of a model."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from ipa_core.errors import RankError


def allocate_ranks(
    spectra: Mapping[str, Sequence[float]], budget: int, *, floor: int = 1, cap: int | None = None
) -> dict[str, int]:
    """Allocate a total rank to layers by marginal captured energy.

    Every layer gets ``floor``; then the layer whose next direction captures most energy gets one
    more, until the budget is spent. For decreasing spectra this captures the most energy.

    Parameters
    ----------
    spectra : mapping of str to sequence of float
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
        If the budget is below the sum of the floors or above the sum of the caps.

    Notes
    -----
    Cost O(budget log layers). Ties go to the first layer.

    Examples
    --------
    >>> from ipa_core import allocate_ranks
    >>> allocate_ranks({"q": [9, 1, 0], "up": [8, 7, 6]}, budget=4)
    {'q': 1, 'up': 3}
    """
    limits = {name: min(len(energies), cap or len(energies)) for name, energies in spectra.items()}
    ranks = {name: min(floor, limit) for name, limit in limits.items()}
    least, most = sum(ranks.values()), sum(limits.values())
    if not least <= budget <= most:
        raise RankError(
            f"expected a budget between {least} and {most}, the sums of floors and caps, "
            f"got {budget}"
        )
    order = {name: index for index, name in enumerate(spectra)}
    queue = [
        (-float(spectra[name][rank]), order[name], name)
        for name, rank in ranks.items()
        if rank < limits[name]
    ]
    heapq.heapify(queue)
    for _ in range(budget - least):
        _, index, name = heapq.heappop(queue)
        ranks[name] += 1
        if ranks[name] < limits[name]:
            heapq.heappush(queue, (-float(spectra[name][ranks[name]]), index, name))
    return ranks
