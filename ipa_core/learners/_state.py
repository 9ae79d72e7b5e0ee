"""Entries of a learner's state: their form, and dataclasses of arrays and numbers."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ipa_core import _array
from ipa_core.errors import ArrayTypeError, FileFormatError


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


def entries_of(name: str, cls: type) -> tuple[list[str], list[str]]:
    """Return the entries of a dataclass in a state: those of numbers, and those of arrays."""
    keys: tuple[list[str], list[str]] = [], []
    for field in fields(cls):
        keys["Array" in str(field.type)].append(f"{name}.{field.name}")
    return keys


def check_numbers(state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Check that entries of a state are numbers.

    Raises
    ------
    FileFormatError
        If an entry is missing or of another type.
    """
    for name in names:
        if not isinstance(state.get(name), (bool, int, float)):
            got = reprlib.repr(state.get(name))
            raise FileFormatError(f"expected a number as entry {name!r} of the state, got {got}")


def check_arrays(state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Check that entries of a state are arrays like its template, where there are any.

    Raises
    ------
    FileFormatError
        If an entry is not a matrix or vector of the template's library and device.
    """
    template = state.get("template")
    for name in names:
        array = state.get(name)
        if array is None:
            continue
        try:
            _array.check_array(array)
            _array.check_home(template, array, "pass a state as it was saved")
        except ArrayTypeError as error:
            raise FileFormatError(f"state entry {name!r}: {error}") from error
        if array.ndim not in (1, 2) or array.shape[-1] == 0:
            raise FileFormatError(
                f"expected a matrix or a vector as entry {name!r} of the state, got shape "
                f"{tuple(array.shape)}"
            )
