"""Learners from factories: what `fit_projector` is given as ``learner``."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

from ipa_core import _settings
from ipa_core.errors import SettingError
from ipa_core.learners.base import Learner


def make_learner(factory: Callable[[int], Learner], value: Any) -> Learner:
    """Return the learner that a factory makes from a rank.

    Raises
    ------
    SettingError
        If the factory is not callable, or makes something else.
    """
    cure = "pass a class, learner=RandomizedSVD, or functools.partial of a class with settings"
    if not callable(factory):
        raise SettingError(
            "expected learner to be a callable that makes a learner from a rank, "
            f"got {reprlib.repr(factory)}; {cure}"
        )
    checked = _settings.rank(value)
    try:
        learner = factory(checked)
    except (TypeError, AttributeError) as error:
        raise SettingError(
            f"expected learner to make a learner from a rank, got {error}; {cure}"
        ) from error
    if not isinstance(learner, Learner):
        raise SettingError(
            f"expected learner to make an ipa_core.Learner, got {type(learner).__name__}; {cure}"
        )
    return learner
