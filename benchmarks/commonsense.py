"""Questions of common sense by a causal language model: python -m benchmarks.commonsense main.

By default SmolLM2-135M and sets from packages, its upper blocks adapted. With --data, a folder with
the paper's files (commonsense_170k.json and SET/test.json), --model, any causal model of
transformers, --adapted 0 for all blocks, --loss-on-prompt and the paper's settings, it is the
protocol of the paper.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from benchmarks.assets import AssetError
from benchmarks.classification import quieten
from benchmarks.evidence.cells import FOLDER, Cells
from benchmarks.evidence.language import LanguageTask
from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.questions import MIXTURE, PACKAGED, from_instructions, packaged
from benchmarks.evidence.study import Study
from benchmarks.evidence.task import Settings

RESULTS = FOLDER / "commonsense.jsonl"

STEPS = 60
MAIN = [
    "LoRA",
    "LoRA, half rank",
    "random A, frozen",
    "IPA, frozen",
    "IPA, trainable",
    "gradient, frozen",
    "damped gradient, frozen",
]


def main() -> int:
    arguments = parser().parse_args()
    quieten()
    try:
        task = language_task(arguments)
    except AssetError as error:
        print(error)
        return 1
    cells = Cells(RESULTS, shlex.join(["python", "-m", "benchmarks.commonsense", *sys.argv[1:]]))
    study = Study(arguments.study, task, settings(arguments), cells, arguments.tuned_on)
    study.run(arguments.methods, range(arguments.seeds))
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("study", choices=["main"])
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=MAIN)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--tuned-on", type=int, default=1, help="seeds that rates are chosen on")
    made.add_argument("--sets", nargs="+", choices=list(PACKAGED), default=list(MIXTURE))
    made.add_argument("--each", type=int, default=400, help="questions of a set to train on")
    made.add_argument("--tested", type=int, default=200, help="questions of a set to test on")
    made.add_argument("--model", type=Path, help="folder of a causal model, with tokenizer")
    made.add_argument("--data", type=Path, help="folder of the paper's files")
    made.add_argument("--adapted", type=int, default=4, help="upper blocks to adapt, 0 for all")
    made.add_argument("--loss-on-prompt", action="store_true")
    made.add_argument("--float32", action="store_true", help="in the place of bfloat16")
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--steps", type=int, default=STEPS)
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--learn-from", type=int, default=96, help="questions to choose P from")
    return made


def settings(arguments: argparse.Namespace) -> Settings:
    """Return the settings that the command line asks for."""
    return Settings(
        rank=arguments.rank,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learn_from=arguments.learn_from,
    )


def language_task(arguments: argparse.Namespace) -> LanguageTask:
    """Return the task that the command line asks for."""
    data, model = arguments.data, arguments.model
    sets = "packaged" if arguments.sets == list(MIXTURE) else " ".join(arguments.sets)
    names = [model.name if model else "SmolLM2-135M", data.name if data else sets]
    if arguments.steps != STEPS:
        names.append(f"{arguments.steps} steps")
    return LanguageTask(
        " ".join(names),
        from_instructions(data, 120)
        if data
        else packaged(arguments.each, arguments.tested, arguments.sets),
        adapted=arguments.adapted or None,
        folder=model,
        on_prompt=arguments.loss_on_prompt,
        dtype=torch.float32 if arguments.float32 else torch.bfloat16,
    )


if __name__ == "__main__":
    raise SystemExit(main())
