"""The rank of a learner, read from ``n_components``."""

from __future__ import annotations

from numbers import Integral, Real

from ipa_core import RankError


def is_share(n_components: object) -> bool:
    """Return whether components are asked for by their share of the variance."""
    if n_components is None or isinstance(n_components, Integral):
        return False
    return isinstance(n_components, Real) and 0.0 < float(n_components) < 1.0


def resolve_rank(n_components: object, rows: int, features: int, weight: float) -> int:
    """Return the rank to learn for the first rows, of the given total weight.

    Raises
    ------
    RankError
        If ``n_components`` is no number of components, or exceeds rows or features.
    """
    if n_components is None:
        return max(1, min(int(weight), features))
    if is_share(n_components):
        return features
    if isinstance(n_components, bool) or not isinstance(n_components, Integral):
        rank = 0
    else:
        rank = int(n_components)
    if rank < 1:
        raise RankError(
            "expected n_components to be an integer of at least 1, a share between 0 and 1 or "
            f"None, got {n_components!r}"
        )
    # scikit-learn's words, which its tests look for.
    if rank > features:
        raise RankError(
            f"n_components={rank} invalid for n_features={features}, need more rows than "
            f"columns for StreamingPCA processing; ask for at most {features}"
        )
    if rank > rows:
        raise RankError(
            f"n_components={rank} must be less or equal to the batch number of samples "
            f"{rows} for the first partial_fit call."
        )
    return rank
