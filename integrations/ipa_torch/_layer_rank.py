"""Rank of a layer."""

from __future__ import annotations

from collections.abc import Mapping

from ipa_core import settings
from ipa_torch.errors import LayerError, named_layer


def resolve_rank(name: str, rank: int | Mapping[str, int]) -> int:
    """Return the rank of a layer, from a rank for all layers or a mapping.

    Raises
    ------
    LayerError
        If the mapping has no rank for it.
    RankError
        If it is not a positive integer.
    """
    if not isinstance(rank, Mapping):
        return settings.rank(rank)
    if name not in rank:
        raise LayerError(f"expected a rank for layer {name!r}, got none; add it to the mapping")
    with named_layer(name):
        return settings.rank(rank[name])
