"""Validation of settings."""

from __future__ import annotations

from typing import Any, get_args

from ipa_core import settings


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Check that an argument is one of the values of a ``Literal``.

    Raises
    ------
    SettingError
        If it is not.
    """
    settings.choice(name, value, get_args(choices))


def check_positive(name: str, value: Any) -> None:
    """Check that an argument is a number above 0, or None.

    Raises
    ------
    SettingError
        If it is not.
    """
    if value is not None:
        settings.number(name, value, form="above 0 or None", valid=lambda number: number > 0)


def resolve_max_patches(max_patches: Any) -> int | None:
    """Return a number of patches.

    Raises
    ------
    SettingError
        If it is neither None nor an integer of at least 1.
    """
    if max_patches is None:
        return None
    cure = "pass None for all patches"
    return settings.integer("max_patches", max_patches, least=1, cure=cure)


def check_dropout(dropout: Any) -> None:
    """Check a probability of dropout.

    Raises
    ------
    SettingError
        If it is not a number of at least 0 and below 1.
    """
    form = "at least 0 and below 1"
    settings.number("dropout", dropout, form=form, valid=lambda number: 0 <= number < 1)
