"""One table of all results beside their targets: python -m benchmarks.summary [--quick]."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from benchmarks.record import FOLDER, table

# File, measure, target, and how to find the figure in the file. A target is the most that a ratio
# may be, or, with a plus, the least.
Row = tuple[str, str, str, Callable[[dict[str, Any]], float | None]]
ROWS: list[Row] = [
    (
        "learners",
        "default learner, long stream, over two bare products of its width, 4,096 features, CPU",
        "1.3",
        lambda r: r["long_stream"]["RandomizedSVD"],
    ),
    (
        "gpu",
        "the same, GPU",
        "1.4",
        lambda r: r["learners"]["torch RandomizedSVD"]["ratio"],
    ),
    (
        "peers",
        "scikit-learn `IncrementalPCA` over ours, 4,096 features, 2,048 rows, rank 32",
        "150+",
        lambda r: r["peers"]["scikit-learn IncrementalPCA"]["time_ratio"],
    ),
    (
        "peers",
        "PEFT `IncrementalPCA` over ours, the same",
        "",
        lambda r: r["peers"]["PEFT IncrementalPCA"]["time_ratio"],
    ),
    (
        "peers",
        "PEFT `IncrementalPCA`, lowrank, over ours, the same",
        "",
        lambda r: r["peers"]["PEFT IncrementalPCA, lowrank"]["time_ratio"],
    ),
    (
        "torch_learning",
        "(forward + learning) / forward, MiniLM, all linear, rank 16, CPU",
        "1.22",
        lambda r: r["learning"]["ratio"],
    ),
    (
        "torch_learning",
        "the same, SmolLM2, rank 32, CPU",
        "1.20",
        lambda r: r["language_model"]["ratio"],
    ),
    (
        "gpu",
        "the same, LLaMA-3-8B shapes, rank 32, bfloat16, GPU",
        "1.10",
        lambda r: r["learning"]["ratio"],
    ),
    (
        "torch_learning",
        "EVA's time over ours, MiniLM, 16 batches of 32, its defaults",
        "10+",
        lambda r: r["against_eva"]["speed_up"],
    ),
    (
        "torch_training",
        "training step over PEFT LoRA's, P frozen, CPU",
        "0.90",
        lambda r: r["step_ratio_median"]["lora"],
    ),
    (
        "torch_training",
        "training step over PEFT DoRA's, P frozen, CPU",
        "",
        lambda r: r["step_ratio_median"]["dora"],
    ),
    (
        "torch_training",
        "memory saved for the backward pass over PEFT LoRA's",
        "0.90",
        lambda r: r["saved_bytes"]["ipa"] / r["saved_bytes"]["lora"],
    ),
    (
        "torch_training",
        "forward pass, adapter unmerged, over PEFT LoRA's",
        "0.90",
        lambda r: r["forward_ratio_median"]["lora"],
    ),
    (
        "gpu",
        "training step over PEFT LoRA's, GPU: time",
        "0.90",
        lambda r: r["training"]["lora"]["time_ratio"],
    ),
    (
        "gpu",
        "training step over PEFT LoRA's, GPU: peak memory",
        "0.90",
        lambda r: r["training"]["lora"]["memory_ratio"],
    ),
    ("growth", "slope of time over rows, log-log", "1.1", lambda r: r["growth"]["rows"]["slope"]),
    ("growth", "... over features", "1.1", lambda r: r["growth"]["features"]["slope"]),
    ("growth", "... over rank", "1.1", lambda r: r["growth"]["rank"]["slope"]),
    ("growth", "... over layers", "1.1", lambda r: r["growth"]["layers"]["slope"]),
]


def summary(quick: bool) -> str:
    """Return the table; what has no results file was not measured."""
    rows = []
    for file, measure, target, find in ROWS:
        path = FOLDER / f"{file}{'_quick' if quick else ''}.json"
        value = find(json.loads(path.read_text())) if path.is_file() else None
        shown = "not measured" if value is None else f"{value:.3g}"
        met = "" if value is None or not target else "yes" if _met(value, target) else "**no**"
        rows.append([measure, target, shown, met, f"`python -m benchmarks.{file}`"])
    return table(["ratio", "target", "measured", "met", "command"], rows) + "\n"


def _met(value: float, target: str) -> bool:
    return value >= float(target[:-1]) if target.endswith("+") else value <= float(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="of the quick runs")
    quick = parser.parse_args().quick
    text = summary(quick)
    print(text)
    if not quick:
        (FOLDER / "summary.md").write_text(text)


if __name__ == "__main__":
    main()
