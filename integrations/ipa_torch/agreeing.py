"""One projector for all workers of a distributed training."""

from __future__ import annotations

import copy
from functools import reduce
from typing import Any

import torch
from torch import distributed

from ipa_core import Learner, Projector


def alone() -> bool:
    """Return whether this process trains by itself."""
    return not (distributed.is_available() and distributed.is_initialized())


def agreed(learner: Learner) -> Projector | None:
    """Return the projector of all workers' rows, the same everywhere; None if there are no rows.

    Learners are merged in the order of the workers, on the host; the one given stays as it is.
    """
    if alone():
        return learner.finalize() if learner.samples else None
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, _on_host(learner.state_dict()))
    learners = [
        copy.copy(learner).load_state_dict(state) for state in states if state["samples"] > 0
    ]
    return reduce(lambda one, other: one.merge(other), learners).finalize() if learners else None


def _on_host(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.cpu() if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
    }
