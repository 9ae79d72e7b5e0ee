"""One cell of each table, run again and held to the committed value: `make evidence-quick`.

A cell agrees if its test accuracy is within one standard error of the committed one, the error of
an accuracy on that many test examples. On the machine of the table it is the same to the digit;
elsewhere matrix products round differently.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import classification, commonsense
from benchmarks.evidence.cells import Cell, Cells, read
from benchmarks.evidence.methods import Adapter
from benchmarks.evidence.study import Study
from benchmarks.evidence.task import Settings, Task
from benchmarks.evidence.texts import TextTask

METHOD = "IPA, frozen"
SEED = 0
#: The set, the backbone and the method of the vision cell.
VISION = ("digits", "saliency-vit-s", "lora")


def main() -> int:
    """Run the cells; the exit status is the number of those that do not agree."""
    classification.quieten()
    failed = 0
    for name, check in CHECKS.items():
        began = time.perf_counter()
        found, wanted, tested = check()
        error = (wanted * (1 - wanted) / tested) ** 0.5
        agrees = abs(found - wanted) <= error
        failed += not agrees
        print(
            f"{name}: {100 * found:.1f} %, committed {100 * wanted:.1f} ± {100 * error:.1f} %, "
            f"{'agrees' if agrees else 'DIFFERS'} ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
    return failed


def classified() -> tuple[float, float, int]:
    task = TextTask("headlines")
    return _again(task, classification.SETTINGS["headlines"], classification.RESULTS)


def answered() -> tuple[float, float, int]:
    arguments = commonsense.parser().parse_args(["main"])
    task = commonsense.language_task(arguments)
    return _again(task, commonsense.settings(arguments), commonsense.RESULTS)


def seen() -> tuple[float, float, int]:
    """Train one method on one set of images, at its committed rate and first seed."""
    import benchmarks.vision  # noqa: F401  isort: skip  (before timm)
    from benchmarks.vtab import __main__ as vtab
    from benchmarks.vtab import make_sets, models, sets
    from benchmarks.vtab.training import Cell as VisionCell
    from benchmarks.vtab.training import Settings as VisionSettings

    name, backbone, method = VISION
    path = vtab.RESULTS / backbone / name / f"{method}.json"
    committed = json.loads(path.read_text(encoding="utf-8"))
    run = committed["runs"][0]
    options = committed["settings"] | {"rates": (run["rate"],), "seeds": (run["seed"],)}
    with tempfile.TemporaryDirectory() as folder:
        make_sets.write(Path(folder) / name, make_sets.SETS[name]())
        data = sets.read(Path(folder), name)
        model = models.backbone(backbone, None, None)
        torch.manual_seed(0)  # of the head, as there
        cell = VisionCell(model, model.make(data), data, VisionSettings(**options))
        result = cell.result(committed["method"])
    return result["runs"][0]["test"], run["test"], committed["test_images"]


def _again(task: Task, settings: Settings, results: Path) -> tuple[float, float, int]:
    """Return the accuracy found, the committed one, and the number of test examples."""
    committed = _committed(results, task.name)
    with tempfile.TemporaryDirectory() as folder:
        study = Study("main", task, settings, Cells(Path(folder) / "cells.jsonl", "quick"))
        cell = study.cell(Adapter(task, settings), METHOD, SEED, committed.rate)
    if (cell.rank, cell.steps, cell.learn_from) != (
        committed.rank,
        committed.steps,
        committed.learn_from,
    ):
        raise ValueError(f"expected the settings of {committed}, got {settings}")
    return cell.accuracy / 100, committed.accuracy / 100, task.size("test")


def _committed(results: Path, task: str) -> Cell:
    for cell in read(results):
        if (cell.study, cell.task, cell.method, cell.seed) == ("main", task, METHOD, SEED):
            return cell
    raise ValueError(f"expected a cell of {METHOD!r} on {task} in {results}, got none")


CHECKS: dict[str, Callable[[], tuple[float, float, int]]] = {
    "classification": classified,
    "commonsense": answered,
    "vision": seen,
}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    raise SystemExit(main())
