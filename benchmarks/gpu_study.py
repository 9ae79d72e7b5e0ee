"""Stage ``study`` of `benchmarks.gpu`: likelihood of held-out text, all blocks, long trainings.

The methods of `benchmarks.likelihood` that decide most, each at three learning rates and three
seeds, are trained at once, as replicas that share the frozen model's passes. A rate is chosen by
the mean over the seeds on validation texts; test texts are looked at for that rate. Steps are as
many as the time limit allows, by a timing beforehand. Figures are written as they come.

Model, texts and A come from a bundle: run `python -m benchmarks.gpu_bundle` where there is a
package index. ``--quick`` runs `benchmarks.gpu_timing` instead, without a bundle.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaModel

from benchmarks.evidence import bundle
from benchmarks.evidence.cuda_graphs import captured
from benchmarks.evidence.replicas import Replicas, ReplicaTraining, Start, Texts
from benchmarks.gpu_bundle import COMMAND, TINY, Plan, toy, write
from benchmarks.gpu_measure import DEVICE

TRAINED, FROZEN = (3e-4, 1e-3, 3e-3), (3e-3, 1e-2, 3e-2)
#: Seconds that the study may take, set-up included.
LIMIT = 450.0
#: Batches are padded to a multiple of this length: one graph for each.
PADDED = 8
#: Positions of all replicas that are computed at once, for the device's memory.
POSITIONS = 36_000
#: Seconds of the limit that are planned for nothing.
SPARE = 4.0
#: Steps between two lines of progress; the number of steps is a multiple.
ROUND = 100
Write = Callable[[dict[str, Any]], None]


class Replica(NamedTuple):
    """A training run."""

    method: str
    seed: int
    rate: float


@dataclass(frozen=True)
class Study:
    """Replicas with their training and the texts that they are measured on."""

    runs: Sequence[Replica]
    starts: Sequence[Start]
    training: ReplicaTraining
    texts: Mapping[str, Texts]
    lengths: Sequence[int]
    warmup: float

    def begin(self, steps: int) -> None:
        """Put the training back to its start."""
        self.training.begin(steps, [start.spent for start in self.starts], self.warmup)

    def nats(self, part: str) -> list[float]:
        """Return the nats of each replica for a token of a part."""
        return [round(x, 5) for x in self.training.nats(self.texts[part], 16).tolist()]


def rehearse(scratch: Path, limit: float, keep: Write) -> dict[str, Any]:
    """Write a tiny bundle and run its study."""
    write(TINY, *toy(TINY, scratch), scratch / "bundle")
    return run(TINY, scratch / "bundle", limit, keep)


def run(plan: Plan, folder: Path, limit: float, keep: Write) -> dict[str, Any]:
    """Train the replicas of a bundle within a limit in seconds; return their nats."""
    began = time.monotonic()
    with tensor_float_32():
        settings, tensors = bundle.read(folder, f"{COMMAND} {folder}")
        study = build(settings, tensors)
        found = {name: settings[name] for name in ("kinds", "rank")}
        found |= {"blocks": settings["config"]["num_hidden_layers"], "replicas": len(study.runs)}
        found |= {"adapters": "float32, products in TF32" if DEVICE == "cuda" else "float32"}
        found["seconds"] = {"setup": _since(began)}
        _run(plan, study, began + limit, found, keep)
        found["seconds"]["all"] = _since(began)
        return found


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Let float32 products on CUDA, those of adapters, have factors of 11 significant bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _run(plan: Plan, study: Study, until: float, found: dict[str, Any], keep: Write) -> None:
    """Measure, time, train and measure again; add to what is found."""
    study.begin(min(ROUND, plan.steps))
    found["untrained"] = {}
    for part in ("validation", "test", "other"):
        start = time.monotonic()
        found["untrained"][part] = study.nats(part)[0]
        found["seconds"][part] = _since(start)
    keep(found)
    start = time.monotonic()
    by_length, found["graph"] = actions(study)
    taken = timed(study, by_length)
    last = sum(found["seconds"][part] for part in ("validation", "test", "other"))
    reserve = last + len(plan.checkpoints) * found["seconds"]["validation"] + SPARE
    left = until - time.monotonic() - reserve
    count = fitting([taken[length] for length in study.lengths], plan.steps, left)
    found |= {"steps": count, "seconds_by_length": {str(n): s for n, s in sorted(taken.items())}}
    found["seconds"]["capture"] = _since(start)
    keep(found)
    study.begin(count)
    start = time.monotonic()
    ended = _train(plan, study, by_length, count, until - last, found, keep)
    found["steps_ended"] = ended
    found["seconds"]["training"] = _since(start)
    found["seconds_per_step"] = found["seconds"]["training"] / ended
    validation = study.nats("validation")
    found["methods"] = chosen(study.runs, validation)
    keep(found)
    tested = {part: study.nats(part) for part in ("test", "other")}
    for name, method in found["methods"].items():
        places = [
            n for n, x in enumerate(study.runs) if (x.method, x.rate) == (name, method["rate"])
        ]
        method["nats"] = [tested["test"][place] for place in places]
        method["mean"] = round(mean(method["nats"]), 5)
        method["other"] = [tested["other"][place] for place in places]
    if DEVICE == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()


def _train(
    plan: Plan,
    study: Study,
    by_length: Mapping[int, Callable[[], None]],
    count: int,
    until: float,
    found: dict[str, Any],
    keep: Write,
) -> int:
    """Train, unless time is over; keep validation at the checkpoints; return the steps."""
    start = time.monotonic()
    found["checkpoints"] = {}
    for number, length in enumerate(study.lengths[:count], 1):
        by_length[length]()
        if number in plan.checkpoints and number < count:
            found["checkpoints"][str(number)] = by_method(study.runs, study.nats("validation"))
            keep(found)
        if number % ROUND == 0 or number == count:
            losses = study.training.curve[number - ROUND if number > ROUND else 0 : number]
            print(f"step {number}: {_since(start)} s, mean loss {losses.mean():.4f}", flush=True)
            if time.monotonic() > until:
                break
    return number


def build(settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Study:
    """Return the study of a bundle, on the device."""
    starts = [
        Start(
            {
                name.removeprefix(f"a/{number}/"): tensor.to(DEVICE)
                for name, tensor in tensors.items()
                if name.startswith(f"a/{number}/")
            },
            start["scaling"],
            start["trainable"],
            start["spent"],
        )
        for number, start in enumerate(settings["starts"])
    ]
    pairs = [
        (Replica(named["method"], named["seed"], rate), start)
        for named, start in zip(settings["starts"], starts, strict=True)
        for rate in (TRAINED if start.trainable else FROZEN)
    ]
    pairs.sort(key=lambda pair: pair[0].seed)  # replicas of a seed share its batches
    runs, repeated = [run for run, _ in pairs], [start for _, start in pairs]
    texts = {
        part: Texts(
            tensors[f"{part}/tokens"].to(DEVICE),
            tensors[f"{part}/labels"].to(DEVICE, torch.long),
            tensors[f"{part}/lengths"],
        )
        for part in ("train", "validation", "test", "other")
    }
    output, order = tensors["output"].to(DEVICE), tensors["order"].long()
    replicas = Replicas(decoder(settings["config"], tensors), output, repeated)
    longest = texts["train"].lengths[order].amax((1, 2))
    lengths = (longest + PADDED - 1).div(PADDED, rounding_mode="floor").mul(PADDED)
    lengths = lengths.clamp_max(texts["train"].tokens.shape[1]).tolist()
    training = ReplicaTraining(
        replicas,
        tensors["embedding"].to(DEVICE),
        texts["train"],
        order,
        [run.rate for run in runs],
        partial(_chunk, len(runs), order.shape[2]),
    )
    return Study(runs, repeated, training, texts, lengths, settings["warmup"])


def decoder(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> LlamaModel:
    """Return the frozen blocks of a bundle on the device, without embeddings.

    Rotary frequencies stay in float32.
    """
    made = LlamaConfig(**config, vocab_size=3, use_cache=False, attn_implementation="sdpa")
    with torch.device(DEVICE):
        body = LlamaModel(made)
    body.eval().requires_grad_(False)
    for name, parameter in body.named_parameters():
        if name != "embed_tokens.weight":
            parameter.data = tensors[f"weights/{name}"].to(DEVICE, tensors["output"].dtype)
    return body


def _chunk(replicas: int, batch: int, length: int) -> int:
    """Return how many texts of a batch of each replica are computed at once: a divisor of all."""
    sizes = [size for size in range(1, batch + 1) if batch % size == 0]
    return max(size for size in sizes if size == 1 or replicas * size * length <= POSITIONS)


def actions(study: Study) -> tuple[dict[int, Callable[[], None]], Any]:
    """Return the steps by length, and true, or the reason that they are not captured."""
    lengths, step = set(study.lengths), study.training.step
    study.training.number.zero_()
    eager = {length: partial(step, length) for length in lengths}
    if DEVICE != "cuda":
        return eager, "not captured: no CUDA device"
    try:
        return captured(step, lengths), True
    except Exception as error:
        print(f"steps are not captured: {error!r}", flush=True)
        torch.cuda.synchronize()
        return eager, f"not captured: {error!r}"


def timed(study: Study, by_length: Mapping[int, Callable[[], None]]) -> dict[int, float]:
    """Return the seconds of a step by length."""
    taken = {}
    for length, action in by_length.items():
        study.training.number.zero_()
        action()
        wait()
        start = time.monotonic()
        for _ in range(2):
            action()
        wait()
        taken[length] = (time.monotonic() - start) / 2
    return taken


def fitting(seconds: Sequence[float], most: int, limit: float) -> int:
    """Return how many steps fit a limit: all, or a multiple of `ROUND`, and one round at least.

    Parameters
    ----------
    seconds : sequence of float
        Of each step.
    most : int
        Steps that are wanted.
    limit : float
        Seconds.
    """
    total, count = 0.0, 0
    for each in seconds[:most]:
        total += each
        if total > limit:
            break
        count += 1
    return count if count == most else min(most, max(ROUND, count // ROUND * ROUND))


def by_method(runs: Sequence[Replica], nats: Sequence[float]) -> dict[str, dict[str, list[float]]]:
    """Return the nats of each seed by method and rate."""
    found: dict[str, dict[str, list[float]]] = {}
    for run, value in zip(runs, nats, strict=True):
        found.setdefault(run.method, {}).setdefault(f"{run.rate:g}", []).append(value)
    return found


def chosen(runs: Sequence[Replica], validation: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Return each method's best rate on validation texts, and whether it is at the edge."""
    found = {}
    for method, rates in by_method(runs, validation).items():
        finite = {rate: mean(nats) for rate, nats in rates.items() if isfinite(mean(nats))}
        best = min(finite or rates, key=lambda rate: finite.get(rate, inf))
        tried = sorted(float(rate) for rate in rates)
        edge = float(best) in (tried[0], tried[-1])
        found[method] = {"rate": float(best), "edge": edge, "validation": rates}
    return found


def _since(start: float) -> float:
    return round(time.monotonic() - start, 2)


def wait() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
