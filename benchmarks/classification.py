"""Classification, all methods: python -m benchmarks.classification main --task headlines.

Texts are read by MiniLM, images (cifar10, mnist5k; timm is needed) by a ViT-S that was DINOv2.

Each method's learning rate is chosen on validation data from one grid, at seeds of their own; then
it is run over the seeds of the tables. What has been run is not run again.
"""

import argparse
import shlex
import sys
from dataclasses import replace

import transformers
from torch import nn

from benchmarks.assets import AssetError
from benchmarks.evidence.cells import FOLDER, Cell, Cells
from benchmarks.evidence.labeled import Labeled
from benchmarks.evidence.methods import BEYOND, COMPARED, LEARNED, METHODS, Adapter
from benchmarks.evidence.study import Study
from benchmarks.evidence.task import Settings
from benchmarks.evidence.texts import SOURCES, TextTask
from ipa_core.errors import MissingDependencyError

RESULTS = FOLDER / "classification.jsonl"
LOSSES = FOLDER / "classification_loss.jsonl"

#: Reviews are twice as long as headlines.
SETTINGS = {
    "headlines": Settings(),
    "reviews": Settings(batch_size=16, learn_from=160),
    "adjectives": Settings(),
    "cifar10": Settings(),
    "mnist5k": Settings(),
}

DEFAULTS = {
    "main": list(COMPARED),
    "beyond": list(BEYOND),
    # A P of another scale wants another learning rate; these have IPA's.
    "learned": [name for name, method in LEARNED.items() if method.scaling == "energy"],
    "rank": [
        "LoRA",
        "IPA, trainable",
        "random A, frozen",
        "IPA, frozen",
        "damped gradient, frozen",
    ],
    "share": ["IPA, frozen"],
    "loss": ["LoRA", "random A, frozen", "IPA, frozen", "LoRA, half rank"],
}


class LossStudy(Study):
    """A study whose figures are nats for each label: small ones are good."""

    task: Labeled

    def merit(self, cell: Cell) -> float:
        return -cell.validation[self.task.name]

    def measured(self, model: nn.Module, part: str) -> dict[str, float]:
        return self.task.nats(model, part)

    def shown(self, cell: Cell) -> str:
        tested = "" if cell.test is None else f", test {cell.test[self.task.name]:.4f}"
        return f"validation {cell.validation[self.task.name]:.4f}{tested}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=list(DEFAULTS))
    parser.add_argument("--task", choices=list(SETTINGS), default="headlines")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tuned-on", type=int, default=1, help="seeds that rates are chosen on")
    arguments = parser.parse_args()
    quieten()
    try:
        task = labeled(arguments.task)
    except (AssetError, MissingDependencyError) as error:
        print(error)
        return 1
    by_loss = arguments.study == "loss"
    command = shlex.join(["python", "-m", "benchmarks.classification", *sys.argv[1:]])
    cells = Cells(LOSSES if by_loss else RESULTS, command)
    settings, seeds = SETTINGS[task.name], range(arguments.seeds)
    kind, name = (LossStudy, "loss") if by_loss else (Study, "main")
    study = kind(name, task, settings, cells, arguments.tuned_on)
    methods = arguments.methods or DEFAULTS[arguments.study]
    adapter = Adapter(task, settings)
    if arguments.study in ("main", "beyond", "loss"):
        study.run(methods, seeds)
    elif arguments.study == "learned":
        study.run_at(dict.fromkeys(methods, study.best_rate(adapter, "IPA, frozen")), seeds)
    else:
        rates = {name: study.best_rate(adapter, name) for name in methods}
        for varied in variations(arguments.study, settings, len(task.training(0))):
            Study(arguments.study, task, varied, cells).run_at(rates, seeds)
    return 0


def labeled(name: str) -> Labeled:
    """Return a task by its name: of texts, or of images, for which timm has to be there."""
    if name in SOURCES:
        return TextTask(name)
    from benchmarks.evidence.images import ImageTask

    return ImageTask(name)


def variations(study: str, settings: Settings, examples: int) -> list[Settings]:
    """Return the settings of a sweep; rates are those of the main study."""
    if study == "rank":
        return [replace(settings, rank=rank) for rank in (1, 4, 16, 64)]
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
