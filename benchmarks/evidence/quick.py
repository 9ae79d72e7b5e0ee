"""Repeat a cell of each table of texts and compare it with the committed value.

    python -m benchmarks.evidence.quick

The exit status is the number of cells that do not agree.
"""

import tempfile
from pathlib import Path

from benchmarks import classification, commonsense
from benchmarks.evidence.agreement import agrees
from benchmarks.evidence.cells import Cell, Cells, read
from benchmarks.evidence.methods import Adapter
from benchmarks.evidence.study import Study
from benchmarks.evidence.task import Settings, Task
from benchmarks.evidence.texts import TextTask

METHOD = "IPA, frozen"
SEED = 0


def main() -> int:
    classification.quieten()
    arguments = commonsense.parser().parse_args(["main"])
    texts = TextTask("headlines"), classification.SETTINGS["headlines"], classification.RESULTS
    found = [again(*texts)]
    language = commonsense.language_task(arguments), commonsense.settings(arguments)
    found.append(again(*language, commonsense.RESULTS))
    return found.count(False)


def again(task: Task, settings: Settings, results: Path) -> bool:
    """Run a committed cell of a task once more; return whether its accuracy agrees."""
    committed = committed_cell(results, task.name, settings)
    with tempfile.TemporaryDirectory() as folder:
        study = Study("main", task, settings, Cells(Path(folder) / "cells.jsonl", "quick"))
        cell = study.cell(Adapter(task, settings), METHOD, SEED, committed.rate)
    accuracies = cell.accuracy / 100, committed.accuracy / 100
    return agrees(f"{task.name}, {METHOD}", *accuracies, task.size("test"))


def committed_cell(results: Path, task: str, settings: Settings) -> Cell:
    """Return the committed cell of `METHOD` and `SEED`, made with these settings."""
    wanted = ("main", task, METHOD, SEED, settings.rank, settings.steps, settings.learn_from)
    for cell in read(results):
        own = (cell.study, cell.task, cell.method, cell.seed, cell.rank, cell.steps)
        if (*own, cell.learn_from) == wanted:
            return cell
    raise ValueError(f"expected a cell {wanted} in {results}, got none")


if __name__ == "__main__":
    raise SystemExit(main())
