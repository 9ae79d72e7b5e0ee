"""Timing of the study's training step: python -m benchmarks.gpu study --quick.

Random weights of SmolLM2-135M's shape and random texts, with the replicas of the study: needs no
bundle, writes nothing.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel

from benchmarks.evidence.language import TARGETS
from benchmarks.evidence.likelihood_methods import LIKELIHOOD
from benchmarks.gpu_bundle import TINY, Plan
from benchmarks.gpu_measure import DEVICE
from benchmarks.gpu_study import Study, actions, build, tensor_float_32, wait

STEPS = 20
#: Largest difference of a loss between eager and captured steps.
TOLERANCE = 0.02
BASE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOLLM2 = {**BASE, "num_attention_heads": 9, "num_key_value_heads": 3}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def run(tiny: bool) -> dict[str, Any]:
    """Return seconds of a step, eager and captured, memory, and the largest difference of losses.

    Raises
    ------
    ValueError
        If eager and captured steps have different losses.
    """
    with tensor_float_32():
        study = build(*(imitation(SMALL, 11, TINY) if tiny else imitation(SMOLLM2, 9856, Plan())))
        step = study.training.step
        eager, losses = _steps(study, {n: partial(step, n) for n in set(study.lengths)})
        found = {"replicas": len(study.runs), "lengths": study.lengths, "seconds": {"eager": eager}}
        print(found, flush=True)
        by_length, found["graph"] = actions(study)
        found["seconds"]["captured"], again = _steps(study, by_length)
    found["difference"] = float((losses - again).abs().max())
    found["mean loss"] = [float(losses[0].mean()), float(losses[-1].mean())]
    if DEVICE == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.memory_reserved()
    if not found["difference"] < TOLERANCE:
        raise ValueError(f"expected the same losses of eager and captured steps, got {found}")
    return found


def _steps(study: Study, by_length: Mapping[int, Callable[[], None]]) -> tuple[float, torch.Tensor]:
    """Train from the start; return the seconds of a step and the losses."""
    study.begin(len(study.lengths))
    wait()
    start = time.monotonic()
    for length in study.lengths:
        by_length[length]()
    wait()
    return (time.monotonic() - start) / len(study.lengths), study.training.curve.clone()


def imitation(
    shape: Mapping[str, int], tokens: int, plan: Plan
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return settings and tensors as of a bundle, with random numbers."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        made = torch.randn(sizes, generator=generator, device=DEVICE)
        return (0.02 * made).to(dtype)

    with torch.device("meta"):
        body = LlamaModel(LlamaConfig(**shape, vocab_size=3))
    tensors = {
        f"weights/{name}": normal(*meta.shape)
        if meta.ndim == 2
        else torch.ones(meta.shape, dtype=dtype)
        for name, meta in body.state_dict().items()
    }
    layers = {
        name: layer for name, layer in body.named_modules() if name.rpartition(".")[2] in TARGETS
    }
    starts = []
    for method in plan.methods:
        for seed in range(plan.seeds):
            for number, (name, layer) in enumerate(layers.items()):
                rank = (
                    4 + 4 * (number % 4) if method == "EVA" else round(8 * LIKELIHOOD[method].rank)
                )
                tensors[f"a/{len(starts)}/{name}"] = normal(rank, layer.in_features)
            scaling = dict.fromkeys(layers, 1.0)
            kept = {"trainable": LIKELIHOOD[method].trainable, "spent": 0.0, "scaling": scaling}
            starts.append({"method": method, "seed": seed, **kept})
    width = shape["hidden_size"]
    tensors |= {"embedding": normal(tokens, width), "output": normal(tokens, width)}
    for part in ("train", "validation", "test", "other"):
        lengths = torch.randint(16, 41, (1000,))
        ids = torch.randint(tokens, (1000, 40))
        tensors |= {f"{part}/tokens": ids, f"{part}/labels": ids, f"{part}/lengths": lengths}
    places = torch.linspace(0, 999, STEPS * 16).long().reshape(STEPS, 1, 16)
    tensors["order"] = tensors["train/lengths"].argsort()[places].expand(-1, plan.seeds, -1)
    return {"config": shape, "starts": starts, "warmup": 0.1}, tensors
