"""Validation of settings: choices, and the rank of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from ipa_core.errors import SettingError
from ipa_torch.errors import LayerError


def check_choice(name: str, value: str, choices: Any) -> None:
    """Check that an argument is one of the values of a ``Literal``.

    Raises
    ------
    SettingError
        If it is not.
    """
    if value not in get_args(choices):
        listed = " or ".join(map(repr, get_args(choices)))
        raise SettingError(f"expected {name} to be {listed}, got {value!r}")


def resolve_rank(name: str, rank: int | Mapping[str, int]) -> int:
    """Return the rank of a layer, from a rank for all layers or a mapping.

    Raises
    ------
    LayerError
        If the mapping has no rank for it.
    """
    if not isinstance(rank, Mapping):
        return rank
    if name not in rank:
        raise LayerError(f"expected a rank for layer {name!r}, got none; add it to the mapping")
    return rank[name]
