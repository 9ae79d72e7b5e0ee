"""Seconds of actions, taken in turns, so that whatever else the machine does falls on all."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Action = Callable[[], object]


def seconds(action: Action) -> float:
    """Return the seconds that an action takes, the work that it gave to a GPU included."""
    _wait()
    start = time.perf_counter()
    action()
    _wait()
    return time.perf_counter() - start


def in_turns(actions: Mapping[str, Action], count: int) -> dict[str, list[float]]:
    """Return ``count`` times of each; a round before them warms up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(count + 1):
        for name, action in actions.items():
            taken = seconds(action)
            if number:
                times[name].append(taken)
    return times


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> float:
    """Return the median, over turns, of one's time over the other's."""
    pairs = zip(times[one], times[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median time of each."""
    return {name: statistics.median(values) for name, values in times.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
