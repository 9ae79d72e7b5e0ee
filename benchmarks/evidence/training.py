"""Training run of one method, with its cost."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import transformers
from peft.optimizers import create_lorafa_optimizer
from torch import nn

from benchmarks.evidence.cutting import Batch
from benchmarks.evidence.refreshing import ScheduledRefresh
from benchmarks.evidence.task import Settings, Task, batches
from benchmarks.memory import saved_for_backward

#: Added to the seed of a run: its batches are not those that P is chosen from.
BATCHES = 1000


@dataclass(frozen=True)
class Cost:
    """Cost of a training run: seconds, steps, trained parameters and memory beside the weights."""

    seconds: float
    steps: int
    trainable: int
    mebibytes: float


FirstStep = Literal["gradient", "sign"]


@dataclass(frozen=True)
class Plan:
    """Training of A and B: their rates, how long A is trained, where B begins.

    Parameters
    ----------
    rate_of_a : float
        Of A's learning rate to B's, where A is trained.
    held_after : float
        Share of the steps after which A is held.
    first_step : {"gradient", "sign"}, optional
        The direction of a step at which B begins, as long as a line search finds best: against its
        gradient, or against the gradient's signs, as Adam's first step is.
    optimizer : {"adam", "lorafa"}
        PEFT's optimizer for LoRA-FA turns the gradient of B by (A A^T)^-1.
    """

    rate_of_a: float = 1.0
    held_after: float = 1.0
    first_step: FirstStep | None = None
    optimizer: Literal["adam", "lorafa"] = "adam"


def train(
    model: nn.Module,
    task: Task,
    settings: Settings,
    rate: float,
    seed: int,
    spent: float,
    turn: ScheduledRefresh | None = None,
    plan: Plan | None = None,
) -> Cost:
    """Train the adapters, and the head, for the steps that are left; return the cost.

    Parameters
    ----------
    model : torch.nn.Module
        As `Adapter` returns it. No dropout: it stays in evaluation mode.
    rate : float
        Learning rate of the adapters.
    spent : float
        Steps that choosing P was worth, taken off the budget.
    turn : ScheduledRefresh, optional
        A refresh of P, when its steps have been trained.
    plan : Plan, optional
        How A and B are trained; together, by Adam, if it is not given.
    """
    plan = plan or Plan()
    began = time.perf_counter()
    steps = settings.steps - round(spent)
    if steps < 1:
        raise ValueError(f"expected P to cost less than {settings.steps} steps, got {spent:g}")
    model.eval()
    named = [(name, p) for name, p in model.body.named_parameters() if p.requires_grad]
    a = [p for name, p in named if "lora_A" in name]
    adapters = [p for _, p in named]
    groups = [
        {"params": a, "lr": rate * plan.rate_of_a},
        {"params": [p for name, p in named if "lora_A" not in name], "lr": rate},
    ]
    head = [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith("body.")
    ]
    if head:
        groups.append({"params": head, "lr": settings.head_rate})
    if plan.optimizer == "lorafa":
        config = model.body.peft_config["default"]
        optimizer = create_lorafa_optimizer(model.body, config.r, config.lora_alpha, rate)
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, round(settings.warmup * steps), steps
    )
    trained = [*adapters, *head]
    kept = 0
    stream = batches(task.training(seed), settings.batch_size, steps, seed + BATCHES)
    for step, batch in enumerate(stream):
        if turn is not None and step == turn.refresh.after:
            turn(optimizer)
        if step == round(plan.held_after * steps):
            for matrix in a:
                matrix.requires_grad_(False)
        if step == 0:
            loss, kept = saved_for_backward(model, partial(task.loss, model, batch))
        else:
            loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    numbers = sum(p.numel() for p in trained)
    # Weights, gradients and the optimizer's two moments, in float32, and what backward needs.
    return Cost(time.perf_counter() - began, steps, numbers, (kept + 16 * numbers) / 2**20)


def begin_b(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
    some: Sequence[Batch],
    kind: FirstStep,
) -> float:
    """Begin B at a step against its gradient or its signs; return the length, 0 if none helps.

    Two forward passes over the first batch: one at a trial length, one at the minimum of the
    parabola through both values and the slope.
    """
    model.eval()
    b = [p for name, p in model.body.named_parameters() if "lora_B" in name]
    gradients, start = _gradients(model, loss, some, b), _loss(model, loss, some[0])
    slope = float(sum(g.square().sum() if kind == "gradient" else g.abs().sum() for g in gradients))
    step = gradients if kind == "gradient" else [g.sign() for g in gradients]
    trial = 0.1 * start / slope  # what would take a tenth of the loss off, if it were linear
    _put(b, step, trial)
    after = _loss(model, loss, some[0])
    bend = (after - start + trial * slope) / trial**2
    best = min(slope / (2 * bend), 4 * trial) if bend > 0 else 4 * trial
    _put(b, step, best)
    reached = {best: _loss(model, loss, some[0]), trial: after, 0.0: start}
    length = min(reached, key=reached.__getitem__)
    _put(b, step, length)
    return length


def _gradients(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
    some: Sequence[Batch],
    parameters: Sequence[nn.Parameter],
) -> list[torch.Tensor]:
    """Return the mean gradient over batches."""
    for batch in some:
        (loss(model, batch) / len(some)).backward()
    found = [p.grad.clone() for p in parameters if p.grad is not None]
    model.zero_grad()
    return found


@torch.no_grad()
def _loss(
    model: nn.Module, loss: Callable[[nn.Module, Batch], torch.Tensor], batch: Batch
) -> float:
    return float(loss(model, batch))


@torch.no_grad()
def _put(parameters: Sequence[nn.Parameter], steps: Sequence[torch.Tensor], length: float) -> None:
    for parameter, step in zip(parameters, steps, strict=True):
        parameter.copy_(-length * step)
