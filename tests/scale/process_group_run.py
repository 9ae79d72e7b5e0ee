"""Fits of a rank in a process group: FOLDER. The outcomes are saved for the test to compare."""

import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ipa_core import ExactCovariance
from ipa_torch import (
    CheckpointConfig,
    DampedGradientSketch,
    GradientSketch,
    GradientWeightedInputs,
    OnlineLearning,
    attach,
    fit_gradient_projectors,
    fit_projectors,
)
from tests.scale import runs

BATCHES = 7


def share(rank, size, count=BATCHES):
    """Return a rank's batches: none of rank 0, unequal numbers of the others."""
    if size == 1:
        return runs.batches(count)
    return runs.batches(count)[rank - 1 :: size - 1] if rank else []


def learn(batches, model=None, **options):
    """Fit all layers with weights."""
    options.setdefault("targets", lambda name, module: hasattr(module, "weight"))
    options.setdefault("learner", ExactCovariance)
    return fit_projectors(
        runs.model() if model is None else model, batches, 3, progress=False, **options
    )


def outcome(fit):
    """Return the projectors' tensors, or the error as text."""
    try:
        projectors = fit()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    tensors = {
        name: (p.components, p.energies, p.total_energy, p.samples)
        for name, p in projectors.items()
    }
    return {
        "learned": tensors,
        "shared": projectors.shared,
        "missing": dict(projectors.missing),
        "stopped": dict(projectors.stopped),
    }


class Branching(nn.Module):
    """Query and value share their input, unless a pixel is above 100."""

    def __init__(self):
        super().__init__()
        self.query, self.value, self.never = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        other = x.clone() if x.max() > 100 else x
        return self.query(x) + self.value(other)


def rows(rank, features=6):
    return torch.randn(50, features, generator=torch.Generator().manual_seed(rank))


def failing(rank, at):
    """Return a forward that fails on one rank."""

    def forward(model, batch):
        if rank == at:
            raise ValueError("no such token")
        model(batch)

    return forward


def branched(rank):
    batch = rows(rank)
    if rank == 1:
        batch[0, 0] = 101.0
    torch.manual_seed(0)
    return learn([batch], Branching(), on_missing="ignore")


def resumed(rank, size, folder):
    """Fail on the last rank at its second batch, then resume."""
    passed = 0

    def forward(model, batch):
        nonlocal passed
        passed += 1
        if rank == size - 1 and passed == 2:
            raise ValueError("killed")
        model(batch)

    where = CheckpointConfig(folder / "checkpoints", batches=1)
    first = outcome(lambda: learn(share(rank, size), checkpoint=where, forward=forward))
    passed = 10
    resumed_fit = outcome(lambda: learn(share(rank, size), checkpoint=where, forward=forward))
    return first, resumed_fit, passed - 10


def online(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    attach(model, fit_projectors(model, [rows(99)], 2, process_group=None, progress=False))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seen = []
    with OnlineLearning(parallel, learner=ExactCovariance) as learning:
        for step in range(3):
            parallel(rows(10 * step + rank)).square().mean().backward()
            optimizer.step()
            learning.step(optimizer)
            seen.append(model[0].projection("default").weight.detach().clone())
    return seen


def split(size):
    """Return a model sharded by FSDP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def sharded(rank, size):
    batches = [rows(10 * rank + n) for n in range(2 + rank)]
    return outcome(lambda: learn(batches, split(size), targets="all-linear"))


def sharded_resumed(rank, size, folder):
    """Fail on the last rank at its fourth batch; rank 0 lacks its third checkpoint."""
    batches = [rows(10 * rank + n) for n in range(5)]

    def broken():
        yield from batches[:3]
        if rank == size - 1:
            raise ValueError("killed")
        yield from batches[3:]

    def run(model, batch):
        passed.append(batch)
        model(batch)

    passed = []
    options = {
        "targets": "all-linear",
        "forward": run,
        "checkpoint": CheckpointConfig(folder / "sharded", batches=1),
    }
    first = outcome(lambda: learn(broken(), split(size), **options))
    mine = folder / "sharded" / f"rank-{rank}-of-{size}"
    steps = sorted(step.name for step in mine.glob("step-*"))
    if rank == 0:
        shutil.rmtree(mine / steps[-1])
    passed.clear()
    second = outcome(lambda: learn(batches, split(size), **options))
    count = len(passed)
    whole = outcome(lambda: learn(batches, split(size), targets="all-linear"))
    if rank == 0:
        (mine / "step-0000000005" / "index.safetensors").write_bytes(b"")
    damaged = outcome(lambda: learn(batches, split(size), **options))
    return first, steps, count, second, whole, damaged


GRADIENT_LEARNERS = {
    "gradient": GradientSketch,
    "mixed": partial(DampedGradientSketch, learner=ExactCovariance, input_share=0.5),
    "inputs": partial(GradientWeightedInputs, learner=ExactCovariance),
}


def by_gradient(batches, name, fails=False):
    def loss(model, batch):
        if fails:
            raise ValueError("no such label")
        return (model(batch) - 1).square().sum()

    return fit_gradient_projectors(
        runs.model(), batches, 3, loss=loss, learner=GRADIENT_LEARNERS[name]
    )


class Counted(nn.Module):
    """DDP broadcasts its buffer in each forward pass."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        return self.fc(x)


def main(folder):
    """Run all fits, and save the outcomes."""
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    batches = share(rank, size)
    outcomes = {
        "exact": outcome(lambda: learn(batches)),
        "default": outcome(
            lambda: fit_projectors(
                runs.model(), batches, 3, targets=["query", "value", "out"], progress=False
            )
        ),
        "branched": outcome(lambda: branched(rank)),
        "failed": outcome(lambda: learn(batches, forward=failing(rank, size - 1))),
        "unequal": outcome(lambda: learn([rows(0, 6 + rank)], nn.Sequential(nn.LazyLinear(4)))),
        "targets": outcome(lambda: learn(batches, targets=["query"] if rank else ["value"])),
        "empty": outcome(lambda: learn([])),
        "resumed": resumed(rank, size, folder),
        "online": online(rank),
        "sharded": sharded(rank, size),
        "sharded again": sharded_resumed(rank, size, folder),
        "alone": outcome(lambda: learn(runs.batches(2 + rank), process_group=None)),
        "gradient": outcome(lambda: by_gradient(batches, "gradient")),
        "mixed": outcome(lambda: by_gradient(batches, "mixed")),
        "inputs": outcome(lambda: by_gradient(batches, "inputs")),
        "gradient failed": outcome(lambda: by_gradient(batches, "inputs", fails=rank == size - 1)),
        "wrapped": outcome(lambda: learn([rows(rank)] * rank, DistributedDataParallel(Counted()))),
    }
    pair = distributed.new_group([size - 2, size - 1])
    if rank >= size - 2:
        outcomes["pair"] = outcome(lambda: learn(batches, process_group=pair))
    outcomes["after"] = outcome(lambda: learn(batches))
    torch.save(outcomes, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
