"""Similarity of adapters: the analysis of the paper's figures 1 and 5.

    python -m benchmarks.evidence.similarity

Trains LoRA from one common start on several sets of texts, and writes the similarity of their A,
their B, their updates B A and their projected features, and the distance that A moved.
"""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from torch import nn

from benchmarks import record
from benchmarks.assets import bigbench, labeled
from benchmarks.classification import quieten
from benchmarks.evidence import questions
from benchmarks.evidence.cells import FOLDER, PACKAGES
from benchmarks.evidence.methods import METHODS, Adapter
from benchmarks.evidence.projections import Sample, second_moments
from benchmarks.evidence.task import Settings, sample
from benchmarks.evidence.texts import SOURCES, Row, TextTask
from benchmarks.evidence.training import train

RESULTS = FOLDER / "similarity.json"
RATE = 1e-2
#: Tasks of BIG-bench with the same choices in all questions, beside those in `SOURCES`.
BIGBENCH = (
    "epistemic_reasoning",
    "fact_checker/fever",
    "formal_fallacies_syllogisms_negation",
    "logical_fallacy_detection",
    "navigate",
    "sports_understanding",
    "strategyqa",
    "winowhy",
)


@dataclass(frozen=True)
class Pair:
    """A, shape (rank, features), and B, shape (outputs, rank), of one layer, in float64."""

    a: torch.Tensor
    b: torch.Tensor


Pairs = Mapping[str, Pair]
Similarity = Callable[[Pair, Pair], float]


def pairs_of(model: nn.Module) -> Pairs:
    """Return the matrices of a PEFT model's LoRA adapter, layer by layer."""
    return pairs_in(get_peft_model_state_dict(model))


def pairs_in(state: Mapping[str, torch.Tensor]) -> Pairs:
    """Return the matrices in a LoRA adapter's state, as `adapter_model.safetensors` holds it."""
    end = ".lora_A.weight"
    names = [name.removesuffix(end) for name in state if name.endswith(end)]
    return {
        name: Pair(
            state[name + end].detach().double().clone(),
            state[f"{name}.lora_B.weight"].detach().double().clone(),
        )
        for name in names
    }


def of_a(one: Pair, other: Pair) -> float:
    """Return the cosine of the two A, as vectors."""
    return _cosine((one.a * other.a).sum(), one.a.norm() * other.a.norm())


def of_b(one: Pair, other: Pair) -> float:
    """Return the cosine of the two B, as vectors."""
    return _cosine((one.b * other.b).sum(), one.b.norm() * other.b.norm())


def of_update(one: Pair, other: Pair) -> float:
    r"""Return the cosine of the two updates B A, without forming them.

    .. math:: \langle B A, B' A' \rangle = \langle B^\top B', A A'^\top \rangle
    """

    def inner(p: Pair, q: Pair) -> torch.Tensor:
        return ((p.b.T @ q.b) * (p.a @ q.a.T)).sum()

    return _cosine(inner(one, other), (inner(one, one) * inner(other, other)).sqrt())


def of_features(a: torch.Tensor, other: torch.Tensor, moment: torch.Tensor) -> float:
    r"""Return the similarity of A x and A' x up to rotation, over inputs with E[x x^T] = C.

    Linear CKA about the origin:
    :math:`\|A C A'^\top\|^2 / (\|A C A^\top\| \, \|A' C A'^\top\|)`.
    """
    norms = (a @ moment @ a.T).norm() * (other @ moment @ other.T).norm()
    return _cosine((a @ moment @ other.T).square().sum(), norms)


def matrix(adapters: Sequence[Pairs], similarity: Similarity) -> list[list[float]]:
    """Return the mean over layers of a similarity, for each pair of adapters of the same layers."""
    rows = [[0.0] * len(adapters) for _ in adapters]
    for (i, one), (j, other) in product(enumerate(adapters), repeat=2):
        rows[i][j] = sum(similarity(one[name], other[name]) for name in one) / len(one)
    return rows


def _cosine(inner: torch.Tensor, norms: torch.Tensor) -> float:
    return float(inner / norms) if float(norms) > 0 else 0.0


def sources() -> dict[str, list[Row]]:
    """Return sets of labeled texts; of Social IQa, each answer is labeled right or wrong."""
    found = {name: load() for name, load in SOURCES.items()}
    found |= {name: labeled(examples) for name, examples in bigbench(*BIGBENCH).items()}
    found["social_iqa"] = [
        (f"{question.instruction} {choice}", int(index == question.right))
        for question in questions.social_iqa()
        for index, choice in enumerate(question.choices)
    ]
    return found


def main() -> None:
    quieten()
    settings = Settings()
    names, adapters, moved, features = [], [], {}, {}
    start: Pairs = {}
    for name, rows in sources().items():
        task = TextTask(name, rows=rows, sizes=(2000, 2000, 100, 500))
        for seed in (0, 1) if name in SOURCES else (0,):
            model, _ = Adapter(task, settings)(METHODS["LoRA"], seed=0)  # one A for all
            start = start or pairs_of(model.body)
            train(model, task, settings, RATE, seed, 0.0)
            found = pairs_of(model.body)
            names.append(f"{name}, order {seed}")
            adapters.append(found)
            print(names[-1], task.accuracy(model, "test"), flush=True)
        moved[name] = {layer: of_a(start[layer], pair) for layer, pair in found.items()}
        some = sample(task.training(0), settings.batch_size, settings.learn_from, 0)
        fresh = Sample(task.fresh(0), some, task.loss, settings.rank, 0)
        moments = second_moments(fresh)
        features[name] = {
            layer: of_features(
                start[layer].a, pair.a, moments[layer.removeprefix("base_model.model.")]
            )
            for layer, pair in found.items()
        }
    command = shlex.join(["python", "-m", "benchmarks.evidence.similarity", *sys.argv[1:]])
    write(
        RESULTS,
        record.circumstances(command, PACKAGES)
        | {
            "adapters": names,
            "a": matrix(adapters, of_a),
            "b": matrix(adapters, of_b),
            "update": matrix(adapters, of_update),
            "a_before_and_after": moved,
            "features_before_and_after": features,
        },
    )


def write(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
