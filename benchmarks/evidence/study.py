"""Running a study: a learning rate for each method by validation, then seeds at that rate."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import mean

from torch import nn

from benchmarks.evidence.cells import TUNING, Cell, Cells
from benchmarks.evidence.methods import METHODS, Adapter, Method
from benchmarks.evidence.task import Settings, Task
from benchmarks.evidence.training import train

#: The one grid of learning rates.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)


@dataclass(frozen=True)
class Study:
    """A task and settings under a name, where the results go, and the seeds of a choice of rate."""

    name: str
    task: Task
    settings: Settings
    cells: Cells
    tuned_on: int = 1
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)

    def run(self, methods: Iterable[str], seeds: Iterable[int]) -> None:
        """Run the methods over the seeds, each at its best rate."""
        adapter = Adapter(self.task, self.settings)
        seeds = list(seeds)
        for name in methods:
            rate = self.best_rate(adapter, name)
            for seed in seeds:
                self.cell(adapter, name, seed, rate)

    def run_at(self, rates: dict[str, float], seeds: Iterable[int]) -> None:
        """Run methods over the seeds at rates chosen elsewhere."""
        adapter = Adapter(self.task, self.settings)
        for name, rate in rates.items():
            for seed in seeds:
                self.cell(adapter, name, seed, rate)

    def best_rate(self, adapter: Adapter, name: str) -> float:
        """Return the rate that is best on validation data, searched outwards until it has worse
        neighbors or the grid ends.
        """
        tried: dict[int, float] = {}
        seeds = range(TUNING, TUNING + self.tuned_on)
        # A frozen A wants more than one that is trained along.
        first = self.first(self.methods[name])
        wanted = [first, first - 1, first + 1]
        while wanted:
            for index in wanted:
                rate = RATES[index]
                cells = [self.cell(adapter, name, seed, rate) for seed in seeds]
                tried[index] = mean(self.merit(cell) for cell in cells)
            best = max(tried, key=tried.__getitem__)
            near = (best - 1, best + 1)
            wanted = [i for i in near if i not in tried and 0 <= i < len(RATES)]
        return RATES[best]

    def first(self, method: Method) -> int:
        """Return the place in the grid where the search begins."""
        return RATES.index(1e-2 if method.trainable else 3e-2)

    def merit(self, cell: Cell) -> float:
        """Return what is to be as large as possible on validation data."""
        return cell.validated

    def measured(self, model: nn.Module, part: str) -> dict[str, float]:
        """Return what is measured of a trained model, by set."""
        return self.task.accuracy(model, part)

    def shown(self, cell: Cell) -> str:
        """Return the figures of a cell for a line of progress."""
        tested = "" if cell.test is None else f", test {cell.accuracy:.1f}"
        return f"validation {cell.validated:.1f}{tested}"

    def cell(self, adapter: Adapter, name: str, seed: int, rate: float) -> Cell:
        """Return a cell, run unless it has been."""
        settings, task = self.settings, self.task
        fixed = settings.rank, settings.steps, settings.learn_from
        known = self.cells.find((self.name, task.name, name, *fixed, seed, rate))
        if known is not None:
            return known
        began = time.perf_counter()
        method = self.methods[name]
        model, spent = adapter(method, seed)
        learning = time.perf_counter() - began
        turn = adapter.turn(method, model, seed)
        cost = train(model, task, settings, rate, seed, spent, turn, method.plan)
        cell = Cell(
            study=self.name,
            task=task.name,
            method=name,
            rank=settings.rank,
            steps=settings.steps,
            learn_from=settings.learn_from,
            seed=seed,
            rate=rate,
            validation=_rounded(self.measured(model, "validation")),
            test=None if seed >= TUNING else _rounded(self.measured(model, "test")),
            steps_of_p=spent,
            trainable=cost.trainable,
            mebibytes=round(cost.mebibytes, 1),
            seconds_of_p=round(learning, 1),
            seconds=round(cost.seconds, 1),
        )
        print(
            f"{self.name:10} {task.name:12} {name:32} rank {cell.rank:<3} seed {seed:<4} "
            f"rate {rate:<6g} {self.shown(cell)}, {cell.seconds:.0f} s",
            flush=True,
        )
        return self.cells.add(cell)


def _rounded(accuracies: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in accuracies.items()}
