"""Measure the cost of a fit over fused experts: python -m benchmarks.hf_moe_cost.

Writes ``results/hf_moe_cost.json``: the time of `fit_projectors` relative to the forward passes,
for fused experts and for linear layers with the same rows, side by side; and, by count, the memory
for a model of 30 billion weights.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

import ipa_hf
from benchmarks import record
from ipa_core import RandomizedSVD
from ipa_torch import fit_projectors
from ipa_torch._fit.learner_bytes import measure_learner_bytes

RANK = 8
TOKENS = 2048
SIZE = {
    "hidden_size": 256,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "vocab_size": 512,
}
#: Qwen3-30B-A3B: blocks, experts, experts of a token, features and intermediate features.
LARGE = {"blocks": 48, "experts": 128, "chosen": 8, "hidden": 2048, "intermediate": 768}


class LinearExperts(nn.Module):
    """Experts as a list of linear layers with the same weights."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.act_fn = experts.act_fn
        self.gate_up_proj, self.down_proj = (
            nn.ModuleList(_linear(matrix) for matrix in parameter)
            for parameter in (experts.gate_up_proj, experts.down_proj)
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute each expert for its tokens."""
        output = torch.zeros_like(hidden_states)
        layers = zip(self.gate_up_proj, self.down_proj, strict=True)
        for expert, (gate_up, down) in enumerate(layers):
            token, choice = torch.where(top_k_index == expert)
            if len(token):
                gate, up = gate_up(hidden_states[token]).chunk(2, dim=-1)
                products = down(self.act_fn(gate) * up) * top_k_weights[token, choice, None]
                output.index_add_(0, token, products)
        return output


def _linear(matrix: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight = nn.Parameter(matrix.detach().clone())
    return layer


def models(experts: int) -> tuple[nn.Module, nn.Module]:
    """Return a model with fused experts, and the same with linear layers."""
    config = transformers.Qwen3MoeConfig(**SIZE, num_experts=experts)
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = transformers.Qwen3MoeModel(config).eval()
        nn.init.normal_(model.get_input_embeddings().weight)
        made.append(model)
    for block in made[1].layers:
        block.mlp.experts = LinearExperts(block.mlp.experts)
    return made[0], made[1]


def measure(experts: int, rounds: int) -> dict[str, float]:
    """Return medians, over rounds side by side, of times and of their ratios."""
    fused, linear = models(experts)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(512, (8, TOKENS // 8), generator=generator) for _ in range(3)]
    with ipa_hf.expert_layers(fused, ["experts.gate_up_proj", "experts.down_proj"]) as names:
        pass
    modules = [name.replace("[", ".").replace("]", "") for name in names]
    learned = _learn_fused(fused, batches), _learn(linear, batches, modules)
    for name, module in zip(names, modules, strict=True):
        torch.testing.assert_close(learned[0][name].energies, learned[1][module].energies)
    times: dict[str, list[float]] = {}
    actions: dict[str, Callable[[], object]] = {
        "fused_forward": lambda: _run(fused, batches),
        "fused_fit": lambda: _learn_fused(fused, batches),
        "linear_forward": lambda: _run(linear, batches),
        "linear_fit": lambda: _learn(linear, batches, modules),
    }
    for _ in range(rounds):
        for name, action in actions.items():
            begin = time.perf_counter()
            action()
            times.setdefault(name, []).append(time.perf_counter() - begin)
    ratios = [
        (fused_fit / fused_forward) / (linear_fit / linear_forward)
        for fused_forward, fused_fit, linear_forward, linear_fit in zip(
            *times.values(), strict=True
        )
    ]
    medians = {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    return medians | {
        "fit_over_forward_fused": statistics.median(
            fit / forward
            for forward, fit in zip(times["fused_forward"], times["fused_fit"], strict=True)
        ),
        "fit_over_forward_linear": statistics.median(
            fit / forward
            for forward, fit in zip(times["linear_forward"], times["linear_fit"], strict=True)
        ),
        "fused_beside_linear": statistics.median(ratios),
        "fused_beside_linear_least": min(ratios),
        "fused_beside_linear_most": max(ratios),
        "fits_fused_over_linear": statistics.median(
            fused / linear
            for fused, linear in zip(times["fused_fit"], times["linear_fit"], strict=True)
        ),
    }


@torch.no_grad()
def _run(model: nn.Module, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        model(batch, use_cache=False)


def _learn(model: nn.Module, batches: list[torch.Tensor], names: list[str]) -> Any:
    return fit_projectors(model, batches, RANK, targets=names, progress=False)


def _learn_fused(model: nn.Module, batches: list[torch.Tensor]) -> Any:
    with ipa_hf.expert_layers(model, ["experts.gate_up_proj", "experts.down_proj"]) as names:
        return _learn(model, batches, names)


def count() -> dict[str, float]:
    """Return bytes of learners, and their operations over those of the experts, by count."""
    sizes = LARGE["hidden"], LARGE["intermediate"]
    held = [measure_learner_bytes(RandomizedSVD, RANK, features, False) for features in sizes]
    learners = LARGE["blocks"] * LARGE["experts"]
    a = RANK * sum(sizes)
    b = RANK * (2 * LARGE["intermediate"] + LARGE["hidden"])
    # (8 r + 32) d operations of the default learner for a row of d features.
    work = LARGE["chosen"] * (8 * RANK + 32) * sum(sizes)
    experts = LARGE["chosen"] * 2 * 3 * LARGE["hidden"] * LARGE["intermediate"]
    return {
        "rank": RANK,
        "learners": 2 * learners,
        "bytes_gate_up": held[0],
        "bytes_down": held[1],
        "bytes_each": learners * sum(held),
        "bytes_shared": LARGE["blocks"] * sum(held),
        "bytes_A": 4 * learners * a,
        "bytes_B": 4 * learners * b,
        "operations_over_experts": work / experts,
        "tokens_for_ten_rows_a_feature": 10 * LARGE["hidden"] * LARGE["experts"] / LARGE["chosen"],
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rounds = 3 if quick else 9
    results = {
        "measured": {f"{n} experts": measure(n, rounds) for n in ((16,) if quick else (16, 64))},
        "counted": count(),
    }
    record.write("hf_moe_cost", quick, ["torch", "transformers"], results)


if __name__ == "__main__":
    main()
