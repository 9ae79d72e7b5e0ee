"""Language models by the likelihood of held-out text: python -m benchmarks.likelihood headlines.

SmolLM2-135M is fine-tuned on one kind of text, with adapters in its upper blocks. The figure is the
negative log-likelihood per token of held-out texts of that kind, in nats, and of texts of another
kind, to see what is forgotten. Rates are chosen on validation texts at a seed of their own. Cells
that are in the results file are not run again.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks.assets import AssetError, cache_folder
from benchmarks.classification import quieten
from benchmarks.evidence.cells import FOLDER, TUNING, Cell, Cells, read
from benchmarks.evidence.corpora import SOURCES, corpus
from benchmarks.evidence.likelihood_methods import LIKELIHOOD, MAIN
from benchmarks.evidence.likelihood_task import LikelihoodTask
from benchmarks.evidence.methods import Adapter, Method
from benchmarks.evidence.study import RATES, Study
from benchmarks.evidence.task import Settings

RESULTS = FOLDER / "likelihood.jsonl"
#: The kind that chooses methods; the others confirm, at its rates unless rates were tried there.
CHOOSING = "headlines"
#: The kind that shows what is forgotten, for each kind that is trained on.
OTHER = {"headlines": "reviews", "reviews": "headlines", "steps": "headlines"}


#: Texts to train on, for validation and for testing.
SIZES = {
    "headlines": (2400, 400, 600),
    "reviews": (1500, 400, 600),
    "steps": (1500, 400, 600),
}


class LikelihoodStudy(Study):
    """A study whose figures are nats for each token: small ones are good."""

    task: LikelihoodTask

    def first(self, method: Method) -> int:
        return RATES.index(1e-2 if method.trainable else 1e-1)

    def merit(self, cell: Cell) -> float:
        return -cell.validation[self.task.kinds[0]]

    def measured(self, model: nn.Module, part: str) -> dict[str, float]:
        return self.task.likelihood(model, part)

    def shown(self, cell: Cell) -> str:
        kind, other = self.task.kinds
        tested = (
            "" if cell.test is None else f", test {cell.test[kind]:.4f} ({cell.test[other]:.3f})"
        )
        return f"validation {cell.validation[kind]:.4f}{tested}"


def main() -> int:
    arguments = parser().parse_args()
    quieten()
    settings = Settings(
        rank=arguments.rank, steps=arguments.steps, batch_size=16, learn_from=arguments.learn_from
    )
    try:
        task = LikelihoodTask(
            corpus(arguments.kind),
            corpus(OTHER[arguments.kind]),
            sizes=SIZES[arguments.kind],
            adapted=arguments.adapted,
            full_vocabulary=arguments.full_vocabulary,
            dtype=torch.float32 if arguments.float32 else torch.bfloat16,
            cache=cache_folder() / "likelihood",
        )
    except AssetError as error:
        print(error)
        return 1
    cells = Cells(RESULTS, shlex.join(["python", "-m", "benchmarks.likelihood", *sys.argv[1:]]))
    study = LikelihoodStudy("likelihood", task, settings, cells, methods=LIKELIHOOD)
    if arguments.rates:
        tune(study, arguments.methods, arguments.rates)
    elif arguments.kind != CHOOSING:
        study.run_at(
            {
                name: known_rate(list(read(RESULTS)), arguments.kind, name, settings)
                for name in arguments.methods
            },
            range(arguments.seeds),
        )
    else:
        study.run(arguments.methods, range(arguments.seeds))
    return 0


def known_rate(cells: Sequence[Cell], kind: str, name: str, settings: Settings) -> float:
    """Return the rate of a method that was best on validation texts of a kind, or of `CHOOSING`.

    A kind has rates of its own as soon as three were tried there.

    Raises
    ------
    ValueError
        If too few were tried with these settings.
    """
    wanted = name, settings.rank, settings.steps, settings.learn_from
    tuned = [
        cell
        for cell in cells
        if (cell.method, cell.rank, cell.steps, cell.learn_from) == wanted and cell.test is None
    ]
    for task in (kind, CHOOSING):
        tried = [cell for cell in tuned if cell.task == task]
        if len(tried) >= 3:
            return min(tried, key=lambda cell: cell.validation[task]).rate
    raise ValueError(f"expected three rates of {wanted} on validation texts; tune it first")


def tune(study: Study, methods: list[str], rates: list[float]) -> None:
    """Run methods at given rates, on validation texts only."""
    adapter = Adapter(study.task, study.settings)
    for name in methods:
        for rate in rates:
            study.cell(adapter, name, TUNING, rate)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("kind", choices=list(SOURCES))
    made.add_argument("--methods", nargs="+", choices=list(LIKELIHOOD), default=list(MAIN))
    made.add_argument("--seeds", type=int, default=3, help="0: rates are chosen, nothing tested")
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--steps", type=int, default=80)
    made.add_argument("--adapted", type=int, default=4, help="upper blocks that are adapted")
    made.add_argument("--learn-from", type=int, default=128, help="texts that P is chosen from")
    made.add_argument("--rates", nargs="+", type=float, help="only these, on validation texts")
    made.add_argument("--full-vocabulary", action="store_true")
    made.add_argument("--float32", action="store_true", help="the model too, not adapters only")
    return made


if __name__ == "__main__":
    raise SystemExit(main())
