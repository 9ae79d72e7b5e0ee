"""Whole learning over a model beside PEFT's EVA and CorDA: time, peak memory, quality.

    python -m benchmarks.torch_peers [--quick]

MiniLM, all linear layers of the encoder, rank 16, 512 movie reviews, two threads, default settings
of all. Batches of 32, but for CorDA, which takes one text at a time. Each runs in a fresh process,
interleaved. Peak memory is what it adds to that of the model. Excess is the reconstruction error of
the inputs from the rows of A, over the optimum, minus one; CorDA seeks another A, the one that
keeps most of W x.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import floor, record
from benchmarks.memory import peak_bytes
from benchmarks.timing import seconds
from benchmarks.torch_learning import PACKAGES, RANK, THREADS, cut, excess, linear, load, moments
from ipa_torch import fit_projectors, select_layers

Found = dict[str, torch.Tensor]  # A by layer


def bare(model: nn.Module, batches: list[Any]) -> Found:
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return {}


def own(model: nn.Module, batches: list[Any]) -> Found:
    found = fit_projectors(model, batches, RANK, targets=linear, progress=False)
    return {name: projector.components for name, projector in found.items()}


class Late(Exception):
    """EVA has had its time."""


class Loader:
    """Batches that end by an exception once time is up: EVA goes round them until it converges."""

    def __init__(self, batches: list[Any], seconds: float = 15) -> None:
        self.batches, self.end = batches, time.monotonic() + seconds * len(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if time.monotonic() > self.end:
                raise Late
            yield batch


def eva(model: nn.Module, batches: list[Any]) -> Found:
    from peft import EvaConfig, LoraConfig, get_eva_state_dict, get_peft_model

    targets = list(select_layers(model, linear))
    config = LoraConfig(
        r=RANK, target_modules=targets, init_lora_weights="eva", eva_config=EvaConfig()
    )
    wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
    try:
        state = get_eva_state_dict(wrapped, Loader(batches), show_progress_bar=False)
    except Late:
        return {}
    return {name.removeprefix("base_model.model."): a for name, a in state.items()}


def corda(model: nn.Module, batches: list[Any]) -> Found:
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    targets = list(select_layers(model, linear))
    config = LoraConfig(
        r=RANK, target_modules=targets, init_lora_weights="corda", corda_config=CordaConfig()
    )
    preprocess_corda(model, config, run_model=lambda: bare(model, batches))
    return {name: model.get_submodule(name).eigens.V_WC.T for name in targets}


METHODS: dict[str, Callable[[nn.Module, list[Any]], Found]] = {
    "bare forward passes": bare,
    "ours": own,
    "EVA": eva,
    "CorDA": corda,
}


def run(name: str, count: int) -> dict[str, Any]:
    """Run one method in this process, which should be fresh."""
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    model, tokenizer, texts = load()
    batches = cut(tokenizer, texts[:count], 1 if name == "CorDA" else 32, count)
    bare(model, batches[:1])
    found: Found = {}
    taken = 0.0

    def action() -> None:
        nonlocal taken
        taken = seconds(lambda: found.update(METHODS[name](model, batches)))

    peak = peak_bytes(action)
    return {"seconds": taken, "peak": peak, "a": {n: a.numpy() for n, a in found.items()}}


def in_fresh_process(name: str, count: int) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(run, name, count).result()
    print(f"{name}: {result['seconds']:.2f} s", flush=True)
    return result


def compare(count: int, repeats: int) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the figures of each, and how many numbers the distinct inputs of the layers have."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for _ in range(repeats):
        for name, results in runs.items():
            results.append(in_fresh_process(name, count))
    model, tokenizer, texts = load()
    oracle = moments(model, cut(tokenizer, texts[:count], 32, count))
    figures = {}
    for name, results in runs.items():
        ratios = [r["seconds"] / o["seconds"] for r, o in zip(results, runs["ours"], strict=True)]
        peaks = [r["peak"] for r in results if r["peak"] is not None]
        errors = [excess(torch.from_numpy(a), oracle[n]) for n, a in results[-1]["a"].items()]
        figures[name] = {
            "seconds": statistics.median(r["seconds"] for r in results),
            "time_ratio": statistics.median(ratios),
            "time_ratios": ratios,
            "peak_bytes": statistics.median(peaks) if peaks else None,
            "excess_mean": float(np.mean(errors)) if errors else None,
            "excess_max": max(errors, default=None),
        }
    return figures, floor.entries(oracle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="128 reviews, once")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    machine = floor.machine()
    figures, entries = compare(*((128, 1) if quick else (512, 3)))
    least = figures["bare forward passes"]["seconds"]
    least += machine.seconds(floor.two_products(RANK, entries))
    text = record.table(
        ["learning", "seconds", "ours = 1", "peak MiB", "excess, mean", "excess, max"],
        [
            ["floor: bare forward passes and the two products", f"{least:.1f}", *["-"] * 4],
            *([name, *cells(row)] for name, row in figures.items()),
        ],
    )
    print(text)
    results = {
        "threads": THREADS,
        "machine_floor": machine.record(),
        "floor_seconds": least,
        "floors": {name: figures[name]["seconds"] / least for name in ("EVA", "CorDA")},
        "peers": figures,
    }
    path = record.write("torch_peers", quick, PACKAGES, results)
    path.with_suffix(".md").write_text(text + "\n")


def cells(row: dict[str, Any]) -> list[str]:
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    errors = (row["excess_mean"], row["excess_max"])
    return [
        f"{row['seconds']:.1f}",
        f"{row['time_ratio']:.1f}",
        peak,
        *("-" if error is None else f"{error:.1e}" for error in errors),
    ]


if __name__ == "__main__":
    main()
