"""Means over seeds and paired differences with their confidence intervals."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import stats

from benchmarks.evidence.cells import TUNING, Cell


@dataclass(frozen=True)
class Difference:
    """Mean of differences paired by seed; `half` is half of the 95 % confidence interval."""

    mean: float
    half: float
    pairs: int

    @property
    def clear(self) -> bool:
        """True if the interval excludes zero."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half:.1f}"


def of_method(cells: Sequence[Cell], method: str) -> list[Cell]:
    """Return the tested cells of a method, by seed."""
    own = (cell for cell in cells if cell.method == method and cell.seed < TUNING)
    return sorted(own, key=lambda cell: cell.seed)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation; of a single value, the latter is not known."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def paired(
    cells: Sequence[Cell],
    others: Sequence[Cell],
    figure: Callable[[Cell], float] = lambda cell: cell.accuracy,
) -> Difference:
    """Return the difference in a figure over the seeds that both have; accuracy in points.

    The interval is Student's, for the spread over training sets, heads, orders and starts. All
    seeds share the test data, whose own sampling error is not in it.

    Raises
    ------
    ValueError
        If fewer than two seeds are common.
    """
    return pooled([(cells, others)], figure)


def pooled(
    groups: Sequence[tuple[Sequence[Cell], Sequence[Cell]]], figure: Callable[[Cell], float]
) -> Difference:
    """Return the mean of the paired differences of several tasks, of equal weight.

    The interval is Student's, for the spread over seeds within a task, pooled over the tasks. It
    says nothing of other tasks.

    Raises
    ------
    ValueError
        If fewer than two seeds are common in a task.
    """
    differences = [_differences(cells, others, figure) for cells, others in groups]
    mean = statistics.mean(statistics.mean(some) for some in differences)
    squares = sum(statistics.variance(some) * (len(some) - 1) for some in differences)
    freedom = sum(len(some) - 1 for some in differences)
    of_mean = sum(1 / len(some) for some in differences) / len(differences) ** 2
    error = (squares / freedom * of_mean) ** 0.5
    half = float(stats.t.ppf(0.975, freedom)) * error
    return Difference(mean, half, sum(map(len, differences)))


def _differences(
    cells: Sequence[Cell], others: Sequence[Cell], figure: Callable[[Cell], float]
) -> list[float]:
    """Return the differences in a figure over the seeds that both have."""
    first, second = ({cell.seed: figure(cell) for cell in some} for some in (cells, others))
    common = sorted(first.keys() & second.keys())
    if len(common) < 2:
        raise ValueError(f"expected at least 2 seeds in common, got {len(common)}")
    return [first[seed] - second[seed] for seed in common]
