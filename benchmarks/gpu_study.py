"""Stage ``study`` of `benchmarks.gpu`: likelihood of held-out text, all blocks, long trainings.

The methods of `benchmarks.likelihood` that decide most, in this order: three learning rates each on
validation texts, then seeds at the best. Small trainings leave a device idle between kernels, so
several processes share it. The study ends at its limit; cells that have ended by then are in their
results file, and the same command goes on with the cells that are left.

A machine without a package index takes model and texts from a cache folder (``IPA_CACHE``) that
`benchmarks.likelihood` has filled elsewhere: the package of SmolLM2 and the folder ``texts``.
"""

import multiprocessing
import queue
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

import torch

from benchmarks.assets import cache_folder
from benchmarks.evidence.cells import FOLDER, TUNING, Cell, Cells
from benchmarks.evidence.corpora import Corpus, corpus
from benchmarks.evidence.likelihood_methods import LIKELIHOOD
from benchmarks.evidence.likelihood_task import LikelihoodTask
from benchmarks.evidence.methods import Adapter
from benchmarks.evidence.task import Settings
from benchmarks.gpu_measure import DEVICE
from benchmarks.likelihood import SIZES, LikelihoodStudy

TRAINED, FROZEN = (3e-4, 1e-3, 3e-3), (3e-3, 1e-2, 3e-2)
COMMAND = "python -m benchmarks.gpu study"
#: A method, a seed and a learning rate.
Wanted: TypeAlias = tuple[str, int, float]


@dataclass(frozen=True)
class Plan:
    """Methods in their order, with what a study of them takes.

    Parameters
    ----------
    methods : sequence of str
    steps, seeds, processes : int
    blocks : int
        Upper blocks that are adapted.
    limit : float
        Seconds after which unfinished cells are given up.
    tiny : bool
        A tiny model and toy texts, for a rehearsal.
    path : Path
        Of the cells.
    """

    methods: tuple[str, ...] = (
        "LoRA",
        "IPA without first token, frozen",
        "random A, frozen",
        "IPA without first token, long rows, trainable",
        "LoRA, half rank",
        "EVA",
    )
    steps: int = 2000
    seeds: int = 3
    processes: int = 8
    blocks: int = 30
    limit: float = 450.0
    tiny: bool = False
    path: Path = FOLDER / "gpu.jsonl"


def steps(tiny: bool, scratch: Path, limit: float = Plan.limit) -> dict[str, Any]:
    """Return the step of the stage; a tiny one writes its cells to ``scratch``."""
    plan = Plan(limit=limit)
    if tiny:
        methods = plan.methods[:2]
        plan = Plan(methods, 12, 2, processes=1, blocks=2, limit=limit, tiny=True, path=scratch)
    return {"study": lambda results: run(plan)}


def run(plan: Plan) -> dict[str, Any]:
    """Run the cells of a plan until its limit; return the nats of each method by seed."""
    ended: queue.Queue[Cell | BaseException] = queue.Queue()
    until = time.monotonic() + plan.limit
    cells: list[Cell] = []
    missing = 0
    with multiprocessing.get_context("spawn").Pool(plan.processes, _prepare, (plan,)) as pool:
        waiting = 0

        def submit(wanted: list[Wanted]) -> int:
            for each in wanted:
                pool.apply_async(_cell, each, callback=ended.put, error_callback=ended.put)
            return len(wanted)

        for method in plan.methods:
            waiting += submit(_tuning(method))
        while waiting:
            try:
                cell = ended.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                missing = waiting
                break
            if isinstance(cell, BaseException):
                raise cell
            waiting -= 1
            cells.append(cell)
            tried = [x for x in cells if x.method == cell.method and x.seed == TUNING]
            if cell.seed == TUNING and len(tried) == len(_tuning(cell.method)):
                rate = _best(tried).rate
                waiting += submit([(cell.method, seed, rate) for seed in range(plan.seeds)])
    found = {name: summarize(name, cells) for name in plan.methods}
    return {"steps": plan.steps, "blocks": plan.blocks, "cells left": missing, "methods": found}


def summarize(method: str, cells: list[Cell]) -> dict[str, Any]:
    """Return rate and nats of a method, and whether the rate is at the edge of those tried."""
    tried = [cell for cell in cells if cell.method == method and cell.seed == TUNING]
    tested = sorted(
        (cell for cell in cells if cell.method == method and cell.test is not None),
        key=lambda cell: cell.seed,
    )
    if not tested:
        return {"validated": {f"{cell.rate:g}": _validated(cell) for cell in tried}}
    rates = sorted(cell.rate for cell in tried)
    nats = [next(iter((cell.test or {}).values())) for cell in tested]
    return {
        "rate": tested[0].rate,
        "edge": tested[0].rate in (rates[0], rates[-1]),
        "nats": nats,
        "mean": mean(nats),
        "trainable": tested[0].trainable,
        "seconds": mean(cell.seconds for cell in tested),
    }


def _tuning(method: str) -> list[Wanted]:
    rates = TRAINED if LIKELIHOOD[method].trainable else FROZEN
    return [(method, TUNING, rate) for rate in rates]


def _best(tried: list[Cell]) -> Cell:
    return min(tried, key=_validated)


def _validated(cell: Cell) -> float:
    return next(iter(cell.validation.values()))


_worker: dict[str, Any] = {}


def _prepare(plan: Plan) -> None:
    """Build task and study in a worker process, once."""
    torch.set_num_threads(1)
    study = build(plan)
    _worker.update(study=study, adapter=Adapter(study.task, study.settings))


def _cell(method: str, seed: int, rate: float) -> Cell:
    cell: Cell = _worker["study"].cell(_worker["adapter"], method, seed, rate)
    return cell


def build(plan: Plan) -> LikelihoodStudy:
    """Return the study of a plan, its model and texts on the device."""
    options: Mapping[str, Any]
    if plan.tiny:
        texts, other = _toy("toy"), _toy("other")
        folder = _tiny_model(plan.path.parent / "model")
        options = {"sizes": (60, 20, 30), "folder": folder, "dtype": torch.float32}
        settings = Settings(rank=2, steps=plan.steps, batch_size=8, learn_from=16)
    else:
        texts, other = corpus("headlines"), corpus("reviews")
        options = {"sizes": SIZES["headlines"], "cache": cache_folder() / "likelihood"}
        settings = Settings(rank=8, steps=plan.steps, batch_size=16, learn_from=128)
    task = LikelihoodTask(texts, other, adapted=plan.blocks, device=DEVICE, **options)
    return LikelihoodStudy("gpu", task, settings, Cells(plan.path, COMMAND), methods=LIKELIHOOD)


WORDS = ("a", "very", "good", "film", "plot", "it", "was", "bad", "dire", "indeed")


def _toy(name: str) -> Corpus:
    numbers = range(len(WORDS) ** 3)
    texts = (" ".join(WORDS[n // 10**k % 10] for k in range(3)) for n in numbers)
    return Corpus(name, tuple(("it was", text) for text in texts))


def _tiny_model(folder: Path) -> Path:
    """Write a random-weight Llama and a tokenizer of words, unless they are there."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if folder.is_dir():
        return folder
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=16, num_hidden_layers=2, **size)
    tokenizer = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate(("[UNK]", *WORDS))}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[UNK]"
    ).save_pretrained(folder)
    return folder
