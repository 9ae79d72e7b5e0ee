"""Classification by MiniLM, all methods: python -m benchmarks.classification main.

Each method's learning rate is chosen on validation data from one grid, at a seed of its own; then
it is run over the seeds of the tables. What has been run is not run again.
"""

import argparse
import shlex
import sys
from dataclasses import replace

import transformers

from benchmarks.assets import AssetError
from benchmarks.evidence.cells import FOLDER, Cells
from benchmarks.evidence.methods import METHODS, Adapter
from benchmarks.evidence.study import Study
from benchmarks.evidence.task import Settings
from benchmarks.evidence.texts import SOURCES, TextTask

RESULTS = FOLDER / "classification.jsonl"

#: Reviews are twice as long as headlines.
SETTINGS = {"headlines": Settings(), "reviews": Settings(batch_size=16, learn_from=160)}

MAIN = [
    "LoRA",
    "LoRA, half rank",
    "random A, frozen",
    "orthonormal, frozen",
    "IPA, frozen",
    "IPA, trainable",
    "gradient, frozen",
    "damped gradient, frozen",
    "gradient less inputs, frozen",
    "DoRA",
    "PiSSA",
    "EVA",
]
DEFAULTS = {
    "main": MAIN,
    "rank": ["LoRA", "IPA, frozen", "IPA, trainable"],
    "share": ["IPA, frozen", "IPA, trainable"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=["main", "rank", "share"])
    parser.add_argument("--task", choices=list(SOURCES), default="headlines")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    quieten()
    try:
        task = TextTask(arguments.task)
    except AssetError as error:
        print(error)
        return 1
    cells = Cells(RESULTS, shlex.join(["python", "-m", "benchmarks.classification", *sys.argv[1:]]))
    settings, seeds = SETTINGS[task.name], range(arguments.seeds)
    study = Study("main", task, settings, cells)
    methods = arguments.methods or DEFAULTS[arguments.study]
    if arguments.study == "main":
        study.run(methods, seeds)
    else:
        adapter = Adapter(task, settings)
        rates = {name: study.best_rate(adapter, name) for name in methods}
        for varied in variations(arguments.study, settings, len(task.training(0))):
            Study(arguments.study, task, varied, cells).run_at(rates, seeds)
    return 0


def variations(study: str, settings: Settings, examples: int) -> list[Settings]:
    """Return the settings of a sweep; rates are those of the main study."""
    if study == "rank":
        return [replace(settings, rank=rank) for rank in (1, 2, 4, 16, 32, 64)]
    # What learning P costs is not asked here: nothing is taken off the steps.
    shares = (0.001, 0.01, 0.1, 1)
    return [
        replace(settings, learn_from=max(1, round(share * examples)), charged=False)
        for share in shares
    ]


def quieten() -> None:
    """Keep libraries from writing between the lines of results."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    raise SystemExit(main())
