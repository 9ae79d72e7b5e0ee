"""Cells of a table, each of one method, seed and learning rate, as lines of JSON.

A line is written when its cell has ended, so a run that is stopped goes on where it was. Before the
cells of a run stands a line with its command, machine, versions and date.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import record

FOLDER = record.FOLDER / "evidence"
PACKAGES = ["ipa-projectors", "peft", "torch", "transformers"]
#: Of the runs that learning rates are chosen by; no run in a table has this seed, or a higher one.
TUNING = 100


@dataclass(frozen=True)
class Cell:
    """Settings and result of one run.

    `test` is None for runs that select a learning rate, which use validation data only.
    """

    study: str
    task: str
    method: str
    rank: int
    steps: int
    learn_from: int
    seed: int
    rate: float
    validation: dict[str, float]
    test: dict[str, float] | None
    steps_of_p: float
    trainable: int
    mebibytes: float
    seconds_of_p: float
    seconds: float

    @property
    def key(self) -> tuple[Any, ...]:
        """Unique key of the cell."""
        settings = self.rank, self.steps, self.learn_from
        return self.study, self.task, self.method, *settings, self.seed, self.rate

    @property
    def accuracy(self) -> float:
        """Mean test accuracy over the sets, in percent."""
        if self.test is None:
            raise ValueError(f"expected a tested cell, got one of tuning: {self.key}")
        return 100 * sum(self.test.values()) / len(self.test)

    @property
    def validated(self) -> float:
        """Mean validation accuracy over the sets, in percent."""
        return 100 * sum(self.validation.values()) / len(self.validation)


class Cells:
    """The cells in a file, which may not be there yet."""

    def __init__(self, path: Path, command: str) -> None:
        self.path = path
        self._command = command
        self._begun = False
        self._known = {cell.key: cell for cell in read(path)}

    def find(self, key: tuple[Any, ...]) -> Cell | None:
        """Return the cell with this key, if it has been run."""
        return self._known.get(key)

    def add(self, cell: Cell) -> Cell:
        """Keep a cell, on disk at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if not self._begun:
                run = record.circumstances(self._command, PACKAGES)
                file.write(json.dumps({"run": run}) + "\n")
                self._begun = True
            file.write(json.dumps(asdict(cell)) + "\n")
        self._known[cell.key] = cell
        return cell


def read(path: Path) -> Iterator[Cell]:
    """Yield the cells in a file; none if there is no file."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            content = json.loads(line)
            if "run" not in content:
                yield Cell(**content)
