"""Validation of settings: integers, ranks, booleans, numbers and objects."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable
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


def number(
    name: str,
    value: Any,
    *,
    form: str = "a finite number",
    valid: Callable[[float], bool] = math.isfinite,
    error: type[IPAError] = SettingError,
) -> float:
    """Return a real number of a valid ``form`` as a float; booleans are none."""
    try:
        scalar = getattr(value, "ndim", 0) == 0
        valued = scalar and type(value).__name__ not in ("bool", "bool_", "str", "bytes")
        result = float(value) if valued else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):
        result = math.nan
    if not valid(result):
        raise error(f"expected {name} to be {form}, got {reprlib.repr(value)}")
    return result


def check_instance(
    name: str,
    value: Any,
    kind: type | tuple[type, ...],
    form: str,
    *,
    cure: str = "",
    error: type[IPAError] = SettingError,
) -> None:
    """Check that a setting is an instance of a class, which ``form`` describes.

    Raises
    ------
    IPAError
        Of class ``error``, if it is not.
    """
    if not isinstance(value, kind):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise error(f"expected {name} to be {form}, got {got}" + (cure and f"; {cure}"))


def check_iterable(
    name: str, value: Any, form: str, *, cure: str = "", error: type[IPAError] = SettingError
) -> None:
    """Check that a setting is a collection or a stream, which ``form`` describes, and no text.

    Raises
    ------
    IPAError
        Of class ``error``, if it is not.
    """
    scalar = isinstance(value, (str, bytes, type)) or getattr(value, "ndim", 1) == 0
    readable = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    if scalar or not readable:
        got = reprlib.repr(value)
        raise error(f"expected {name} to be {form}, got {got}" + (cure and f"; {cure}"))


def check_callable(name: str, value: Any, *, cure: str = "") -> None:
    """Check that a setting can be called.

    Raises
    ------
    SettingError
        If it cannot.
    """
    if not callable(value):
        raise SettingError(
            f"expected {name} to be callable, got {reprlib.repr(value)}" + (cure and f"; {cure}")
        )
