"""Memory and time of a training step by method and rank: python -m benchmarks.likelihood_cost.

SmolLM2-135M on headlines as in `benchmarks.likelihood`. Memory is what a step keeps beside the
frozen weights: activations for the backward pass, adapters, their gradients and Adam's moments. All
steps are timed alternately, on batches of about equal length.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks import record
from benchmarks.assets import cache_folder
from benchmarks.classification import quieten
from benchmarks.evidence.cells import PACKAGES
from benchmarks.evidence.corpora import corpus
from benchmarks.evidence.cutting import Batch
from benchmarks.evidence.likelihood_methods import LIKELIHOOD
from benchmarks.evidence.likelihood_task import LikelihoodTask
from benchmarks.evidence.methods import Adapter
from benchmarks.evidence.task import Settings
from benchmarks.likelihood import OTHER, SIZES
from benchmarks.memory import saved_for_backward
from benchmarks.timing import interleaved, medians, ratio

METHODS = ("LoRA", "LoRA, upper half of the blocks", "random A, frozen")
RANKS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 15
BASE = "LoRA, rank 8"


def main() -> None:
    quieten()
    task = LikelihoodTask(
        corpus("headlines"),
        corpus(OTHER["headlines"]),
        sizes=SIZES["headlines"],
        cache=cache_folder() / "likelihood",
    )
    figures = cost(task, RANKS, ROUNDS)
    lines = [[name, *map(str, values.values())] for name, values in figures.items()]
    text = record.table(["method", "trained", "MiB", "time of a step to LoRA, rank 8"], lines)
    (record.FOLDER / "likelihood_cost.md").write_text(text + "\n", encoding="utf-8")
    record.write("likelihood_cost", False, PACKAGES, {"steps": figures})


def cost(task: LikelihoodTask, ranks: tuple[int, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Return trained numbers, MiB and the time ratio of a training step, by method and rank."""
    actions, figures = {}, {}
    for method in METHODS:
        for rank in ranks:
            adapter = Adapter(task, Settings(rank=rank, batch_size=16))
            model, _ = adapter(LIKELIHOOD[method], 0)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            batch = task.some(16)[0]
            loss, kept = saved_for_backward(model, partial(task.loss, model, batch))
            loss.backward()
            name = f"{method}, rank {rank}"
            actions[name] = _step(model, task.loss, batch)
            mebibytes = (kept + 16 * trained) / 2**20
            figures[name] = {"trained": trained, "MiB": round(mebibytes, 1)}
    times = interleaved(actions, rounds)
    print(medians(times))
    base = BASE if BASE in times else next(iter(times))
    return {
        name: values | {"time": round(ratio(times, name, base), 2)}
        for name, values in figures.items()
    }


def _step(
    model: nn.Module, loss: Callable[[nn.Module, Batch], torch.Tensor], batch: Batch
) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def step() -> None:
        loss(model, batch).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
