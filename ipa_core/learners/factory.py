"""Learners from factories: what `fit_projector` is given as ``learner``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ipa_core import settings
from ipa_core.errors import SettingError
from ipa_core.learners.base import Learner

L = TypeVar("L")
_CURE = "pass a class, learner=RandomizedSVD, or functools.partial of a class with settings"


def make_learner(factory: Callable[[int], Learner], value: Any) -> Learner:
    """Return the learner that a factory makes from a rank.

    Raises
    ------
    SettingError
        If the factory is not callable, or makes something else.
    """
    return make_learner_of(Learner, factory, value, _CURE)


def make_learner_of(kind: Any, factory: Callable[[int], L], value: Any, cure: str) -> L:
    """Return the learner of a class or protocol that a factory makes from a rank.

    Raises
    ------
    SettingError
        If the factory is not callable, or makes something else.
    """
    settings.check_callable("learner", factory, cure=cure)
    checked = settings.rank(value)
    try:
        learner = factory(checked)
    except (TypeError, AttributeError) as error:
        raise SettingError(
            f"expected learner to make a learner from a rank, got {error}; {cure}"
        ) from error
    settings.check_instance("the result of learner", learner, kind, f"a {kind.__name__}", cure=cure)
    return learner
