"""Training run of one method, with its cost."""

import time
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from torch import nn

from benchmarks.evidence.refreshing import ScheduledRefresh
from benchmarks.evidence.task import Settings, Task, batches
from benchmarks.memory import saved_for_backward


@dataclass(frozen=True)
class Cost:
    """Cost of a training run: seconds, steps, trained parameters and memory beside the weights."""

    seconds: float
    steps: int
    trainable: int
    mebibytes: float


def train(
    model: nn.Module,
    task: Task,
    settings: Settings,
    rate: float,
    seed: int,
    spent: float,
    turn: ScheduledRefresh | None = None,
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
    """
    began = time.perf_counter()
    steps = settings.steps - round(spent)
    if steps < 1:
        raise ValueError(f"expected P to cost less than {settings.steps} steps, got {spent:g}")
    model.eval()
    adapters = [p for p in model.body.parameters() if p.requires_grad]
    groups = [{"params": adapters, "lr": rate}]
    head = [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith("body.")
    ]
    if head:
        groups.append({"params": head, "lr": settings.head_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, round(settings.warmup * steps), steps
    )
    trained = [*adapters, *head]
    kept = 0
    # Not the seed of the batches that P is chosen from.
    stream = batches(task.training(seed), settings.batch_size, steps, seed + 1000)
    for step, batch in enumerate(stream):
        if turn is not None and step == turn.refresh.after:
            turn(optimizer)
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
