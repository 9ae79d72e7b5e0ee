"""Guarantee that a learner declares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Guarantee:
    """Guarantee on the excess of a learner's reconstruction error over the optimum.

    Parameters
    ----------
    kind : {"exact", "bounded", "statistical"}
        ``exact``: the optimum up to rounding. ``bounded``: within ``excess`` of it on any cutting,
        order and merging of a stream whose distribution does not drift. ``statistical``: within
        ``excess``, but for rare chances, once such a stream is long beside the rank.
    excess : float
        residual / optimal residual - 1.

    Examples
    --------
    >>> from ipa_core import RandomizedSVD
    >>> RandomizedSVD.guarantee
    Guarantee(kind='bounded', excess=0.05)
    """

    kind: Literal["exact", "bounded", "statistical"]
    excess: float
