"""Find the demo's learning rates on validation data: python -m benchmarks.demo_sweep."""

import argparse
import json
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.assets import AssetError
from benchmarks.demo_task import FROZEN, LORA, METHODS, QUICK, RANDOM, TRAINABLE, Settings, Task
from ipa_torch import LayerProjectors

RESULTS = Path(__file__).parent / "results" / "demo_sweep.json"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# Where the search of each method begins; it goes on until the best rate has worse neighbors.
BEGIN = {LORA: 1e-3, RANDOM: 1e-2, FROZEN: 1e-2, TRAINABLE: 3e-3}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, nothing is written")
    quick = parser.parse_args().quick
    settings = QUICK if quick else Settings()
    try:
        task = Task(settings)
    except AssetError as error:
        print(error)
        return 1
    projectors = task.learn()
    runs = [run for method in METHODS for run in sweep(task, method, projectors)]
    if not quick:
        write(settings, runs)
    return 0


def sweep(task: Task, method: str, projectors: LayerProjectors) -> list[dict[str, Any]]:
    """Try rates, from the first one outwards, until the best one lies between two others."""
    runs: dict[int, dict[str, Any]] = {}
    first = RATES.index(BEGIN[method])
    wanted = [first, first - 1, first + 1]
    while wanted:
        for index in wanted:
            runs[index] = measure(task, method, projectors, RATES[index])
        best = max(runs, key=lambda index: runs[index]["validation_accuracy"])
        near = (best - 1, best + 1)
        wanted = [i for i in near if i not in runs and 0 <= i < len(RATES)]
    return [runs[index] for index in sorted(runs)]


def measure(task: Task, method: str, projectors: LayerProjectors, rate: float) -> dict[str, Any]:
    model = task.classifier(method, projectors)
    seconds = task.train(model, rate, f"{method} at {rate:g}")
    accuracy = task.accuracy(model, task.splits.validation)
    print(f"{method:24} {rate:8.0e} {accuracy:6.3f} {seconds:6.0f} s", flush=True)
    return {
        "method": method,
        "rate": rate,
        "validation_accuracy": round(accuracy, 4),
        "seconds": round(seconds, 1),
    }


def write(settings: Settings, runs: list[dict[str, Any]]) -> None:
    best = {
        method: max(
            (run for run in runs if run["method"] == method),
            key=lambda run: run["validation_accuracy"],
        )
        for method in METHODS
    }
    content = {
        "command": "python -m benchmarks.demo_sweep",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {
            name: version(name) for name in ("ipa-projectors", "peft", "torch", "transformers")
        },
        "settings": asdict(settings),
        "runs": runs,
        "chosen": {method: run["rate"] for method, run in best.items()},
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
