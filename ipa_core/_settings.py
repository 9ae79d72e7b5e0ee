"""Validation of settings: integers, ranks, booleans and numbers."""

from __future__ import annotations

import math
import operator
import reprlib
from typing import Any

from ipa_core.errors import IPAError, RankError, SettingError


def integer(
    name: str, value: Any, *, least: int, cure: str = "", error: type[IPAError] = SettingError
) -> int:
    """Return a setting as an int; NumPy's integers are accepted, booleans are not."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or number < least:
        raise error(
            f"expected {name} to be an integer of at least {least}, got {reprlib.repr(value)}"
            + (cure and f"; {cure}")
        )
    return number


def rank(value: Any, *, most: int | None = None, cure: str = "") -> int:
    """Return a rank as an int.

    Raises
    ------
    RankError
        If it is not an integer of at least 1 and at most ``most``.
    """
    try:
        number = integer("rank", value, least=1, error=RankError)
    except RankError:
        number = 0
    if number and (most is None or number <= most):
        return number
    limits = "a rank that is a positive integer" if most is None else f"a rank between 1 and {most}"
    raise RankError(f"expected {limits}, got {reprlib.repr(value)}" + (cure and f"; {cure}"))


def boolean(name: str, value: Any) -> bool:
    """Return a setting as a bool; NumPy's booleans are accepted."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise SettingError(f"expected {name} to be True or False, got {reprlib.repr(value)}")
    return bool(value)


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return a setting that is one of a few strings."""
    if not isinstance(value, str) or value not in choices:
        listed = " or ".join(map(repr, choices))
        raise SettingError(f"expected {name} to be {listed}, got {reprlib.repr(value)}")
    return value


def number(name: str, value: Any, *, error: type[IPAError] = SettingError) -> float:
    """Return a finite real number as a float."""
    try:
        result = float("nan") if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        result = float("nan")
    if not math.isfinite(result):
        raise error(f"expected {name} to be a finite number, got {reprlib.repr(value)}")
    return result
