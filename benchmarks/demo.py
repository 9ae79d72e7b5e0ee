"""Learn P for a real model and fine-tune with it, beside LoRA: python -m benchmarks.demo."""

import argparse
import json
import time
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.assets import AssetError
from benchmarks.demo_plot import plot
from benchmarks.demo_sweep import RESULTS
from benchmarks.demo_task import FROZEN, METHODS, QUICK, RANK, Classifier, Run, Settings, Task
from ipa_core.text_table import align


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    arguments = parser.parse_args()
    try:
        task = Task(QUICK if arguments.quick else Settings())
    except AssetError as error:
        print(error)
        return 1
    demonstrate(task, arguments.out)
    return 0


def demonstrate(task: Task, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    settings, splits = task.settings, task.splits
    print(
        f"Movie reviews: {len(splits.train):,} for training, {len(splits.test):,} for testing.\n"
        f"Learning P, rank {RANK}, from {settings.learn_from:,} training reviews "
        "for every linear layer of all-MiniLM-L6-v2:\n"
    )
    began = time.perf_counter()
    projectors = task.learn()
    learning = time.perf_counter() - began
    print(projectors.table())
    print(f"\nFine-tuning, {settings.steps} steps of {settings.batch_size} reviews each:\n")

    rates = json.loads(RESULTS.read_text(encoding="utf-8"))["chosen"]
    runs = []
    for method in METHODS:
        model = task.classifier(method, projectors)
        training = task.train(model, rates[method], method)
        runs.append(
            Run(
                method=method,
                trainable=model.trainable(),
                accuracy=task.accuracy(model, splits.test),
                tested=len(splits.test),
                seed=settings.seed,
                rate=rates[method],
                learning=learning if method.startswith("IPA") else 0.0,
                training=training,
            )
        )
        print(f"  {method}: {training:.0f} s", flush=True)
        if method == FROZEN:
            save(model, out / "adapter")
    print(f"\n{table(runs)}")
    print(
        "\nOne run of each is no comparison of methods: with other seeds the order changes. "
        "Comparisons over seeds are in benchmarks/."
    )
    plot(projectors, runs, out / "demo.png")
    print(f"\nWritten: {out / 'adapter'} ({FROZEN}; plain PEFT loads it) and {out / 'demo.png'}")


def save(model: Classifier, folder: Path) -> None:
    """Write the adapter as PEFT does, and the classifier's own head beside it."""
    model.encoder.save_pretrained(folder)
    head = {name: value.contiguous() for name, value in model.head.state_dict().items()}
    save_file(head, folder / "head.safetensors")


def table(runs: list[Run]) -> str:
    """Return the runs as a table, one row each."""
    rows = [
        ("method", "trainable", "test accuracy", "seed", "learning rate", "learn P", "train"),
        *(
            (
                run.method,
                f"{run.trainable:,}",
                f"{100 * run.accuracy:.1f} ± {100 * run.standard_error:.1f} %",
                str(run.seed),
                f"{run.rate:g}",
                f"{run.learning:.0f} s" if run.learning else "-",
                f"{run.training:.0f} s",
            )
            for run in runs
        ),
    ]
    rules = tuple("-" * max(map(len, column)) for column in zip(*rows, strict=True))
    return align([rows[0], rules, *rows[1:]], left={0})


if __name__ == "__main__":
    raise SystemExit(main())
