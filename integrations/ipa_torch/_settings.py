"""Validation of settings."""

from __future__ import annotations

from typing import Any, get_args

from ipa_core.errors import SettingError


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
