"""Classification by MiniLM, all methods: python -m benchmarks.classification main.

Each method's learning rate is chosen on validation data from one grid, at a seed of its own; then
it is run over the seeds of the tables. What has been run is not run again.
"""

import argparse
import shlex
import sys

import transformers

from benchmarks.assets import AssetError
from benchmarks.evidence.cells import FOLDER, Cells
from benchmarks.evidence.methods import METHODS
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=["main"])
    parser.add_argument("--task", choices=list(SOURCES), default="headlines")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=MAIN)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    quieten()
    try:
        task = TextTask(arguments.task)
    except AssetError as error:
        print(error)
        return 1
    cells = Cells(RESULTS, shlex.join(["python", "-m", "benchmarks.classification", *sys.argv[1:]]))
    Study(arguments.study, task, SETTINGS[task.name], cells).run(
        arguments.methods, range(arguments.seeds)
    )
    return 0


def quieten() -> None:
    """Keep libraries from writing between the lines of results."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    raise SystemExit(main())
