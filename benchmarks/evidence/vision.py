"""Cells of the vision table, in the form of the other tables."""

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks import record
from benchmarks.evidence.cells import Cell

RESULTS = record.FOLDER / "vtab"


def read(folder: Path = RESULTS) -> Iterator[Cell]:
    """Yield a cell for each seed of each method, on each set and backbone in a folder."""
    for path in sorted(folder.glob("*/*/*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for run in found["runs"]:
            yield Cell(
                study="main",
                task=f"{found['set']} ({found['backbone']})",
                method=found["method"],
                rank=found["rank"],
                steps=found["settings"]["epochs"],
                learn_from=0,  # all training images
                seed=run["seed"],
                rate=run["rate"],
                validation={found["set"]: run["validation"]},
                test={found["set"]: run["test"]},
                steps_of_p=0.0,
                trainable=found["trainable"],
                mebibytes=0.0,
                seconds_of_p=0.0,
                seconds=run["seconds"],
            )
