"""Dataclasses of arrays and numbers as entries of a learner's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ipa_core.errors import FileFormatError


def flatten(name: str, value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as entries ``name.field``; none for None."""
    if value is None:
        return {}
    return {f"{name}.{field.name}": getattr(value, field.name) for field in fields(value)}


def unflatten(name: str, cls: type, state: Mapping[str, Any]) -> Any:
    """Return the dataclass whose fields are entries ``name.field``; None if there are none.

    Raises
    ------
    FileFormatError
        If some of its entries are missing.
    """
    keys = {field.name: f"{name}.{field.name}" for field in fields(cls)}
    if not any(key in state for key in keys.values()):
        return None
    try:
        return cls(**{field: state[key] for field, key in keys.items()})
    except KeyError as error:
        raise FileFormatError(f"expected an entry {error} in the state, got none") from error
