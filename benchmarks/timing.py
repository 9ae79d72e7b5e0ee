"""Interleaved timing of actions, so that other load on the machine affects all of them."""

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


def interleaved(actions: Mapping[str, Action], count: int) -> dict[str, list[float]]:
    """Return ``count`` times of each action, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(count + 1):
        for name, action in actions.items():
            taken = seconds(action)
            if number:
                times[name].append(taken)
    return times


def ratio(times: Mapping[str, list[float]], action: str, other: str) -> float:
    """Return the median, over rounds, of the ratio of two actions' times."""
    pairs = zip(times[action], times[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median time of each."""
    return {name: statistics.median(values) for name, values in times.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
