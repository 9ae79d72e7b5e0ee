"""Learning and training on a GPU, beside their floors and PEFT.

    python -m benchmarks.gpu [--blocks 8] [--rehearse]

Learners of CuPy and torch on one device; learning over a random-weight model of LLaMA-3-8B's
shapes in bfloat16, beside its bare forward pass and PEFT's EVA; a training step beside PEFT's LoRA
and DoRA. The device's own floor (a large matrix product, a large copy) stands first. ``--rehearse``
runs all of it, tiny, on whatever device there is, and writes nothing.
"""

import argparse
import copy
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import record
from benchmarks.torch_learning import Late, Loader
from ipa_core import IncrementalPCA, Learner, RandomizedSVD
from ipa_torch import attach, detach, fit_projectors, select_layers

RANK = 32
PACKAGES = ["ipa-projectors", "peft", "torch", "transformers"]
Action = Callable[[], object]


class Device:
    """Where it runs: how to wait for it, and what it has allocated."""

    def __init__(self) -> None:
        self.name = "cuda" if torch.cuda.is_available() else "cpu"

    def wait(self) -> None:
        if self.name == "cuda":
            torch.cuda.synchronize()

    def seconds(self, action: Action) -> float:
        self.wait()
        start = time.perf_counter()
        action()
        self.wait()
        return time.perf_counter() - start

    def in_turns(self, actions: dict[str, Action], count: int) -> dict[str, float]:
        """Return the median seconds of each; the first round warms up."""
        times: dict[str, list[float]] = {name: [] for name in actions}
        for number in range(count + 1):
            for name, action in actions.items():
                taken = self.seconds(action)
                if number:
                    times[name].append(taken)
        return {name: statistics.median(values) for name, values in times.items()}

    def peak_bytes(self, action: Action) -> int | None:
        if self.name != "cuda":
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def describe(self) -> str:
        return torch.cuda.get_device_name() if self.name == "cuda" else "cpu"


def roofline(device: Device, size: int) -> dict[str, float]:
    """Return what a large product and a large copy reach."""
    a, b = (torch.randn(size, size, device=device.name, dtype=torch.bfloat16) for _ in range(2))
    wide = a.float()
    taken = device.in_turns(
        {"bfloat16": lambda: a @ b, "float32": lambda: wide @ wide, "copy": wide.clone}, 5
    )
    return {
        "bfloat16_tflops": 2 * size**3 / taken["bfloat16"] / 1e12,
        "float32_tflops": 2 * size**3 / taken["float32"] / 1e12,
        "copy_gb_per_second": 2 * wide.nbytes / taken["copy"] / 1e9,
    }


def learners(device: Device, features: int, rows: int, batches: int) -> dict[str, Any]:
    """Compare libraries and learners with the two bare products of the sketch's width."""
    scale = torch.arange(1, features + 1, device=device.name) ** -0.5
    pool = [torch.randn(rows, features, device=device.name) * scale for _ in range(4)]
    basis = torch.linalg.qr(torch.randn(features, 2 * RANK + 8, device=device.name)).Q

    def bare() -> None:
        image = torch.zeros_like(basis)
        for number in range(batches):
            x = pool[number % 4]
            image = image + x.T @ (x @ basis)

    def learn(make: Callable[[int], Learner], data: list[Any]) -> Action:
        def go() -> None:
            learner = make(RANK)
            for number in range(batches):
                learner.update(data[number % 4])
            learner.finalize()

        return go

    actions: dict[str, Action] = {"two bare products": bare}
    for make in (RandomizedSVD, IncrementalPCA):
        actions[f"torch {make.__name__}"] = learn(make, pool)
    if device.name == "cuda" and importlib.util.find_spec("cupy"):
        import cupy

        shared = [cupy.from_dlpack(x) for x in pool]
        for make in (RandomizedSVD, IncrementalPCA):
            actions[f"cupy {make.__name__}"] = learn(make, shared)
    taken = device.in_turns(actions, 3)
    floor = taken["two bare products"]
    return {name: {"seconds": t, "ratio": t / floor} for name, t in taken.items()}


def llama(blocks: int, tiny: bool, device: Device) -> nn.Module:
    """Return a random-weight model of LLaMA-3-8B's shapes, with as many blocks as asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = (
        {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        if tiny
        else {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    )
    config = LlamaConfig(
        **shape,
        num_key_value_heads=2 if tiny else 8,
        num_hidden_layers=blocks,
        vocab_size=256 if tiny else 128_256,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    with torch.device(device.name):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def tokens(model: nn.Module, count: int, batch: int, length: int) -> list[dict[str, torch.Tensor]]:
    parameter = next(model.parameters())
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (count, batch, length), device=parameter.device)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


def learning(device: Device, model: nn.Module, batches: list[Any], rank: int) -> dict[str, Any]:
    """Compare a pass over all batches with the same pass, learning; then with EVA."""
    body, targets = model.model, list(select_layers(model.model, "all-linear"))

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                body(**batch)

    def learn() -> None:
        fit_projectors(body, batches, rank, targets=targets, progress=False)

    taken = device.in_turns({"bare": bare, "learning": learn}, 3)
    figures: dict[str, Any] = taken | {"ratio": taken["learning"] / taken["bare"]}
    figures["peak_bytes"] = {"bare": device.peak_bytes(bare), "learning": device.peak_bytes(learn)}
    return figures | eva(device, body, batches, rank, targets, taken["learning"])


def eva(
    device: Device, body: nn.Module, batches: list[Any], rank: int, targets: list[str], own: float
) -> dict[str, Any]:
    from peft import EvaConfig, LoraConfig, get_eva_state_dict, get_peft_model

    config = LoraConfig(
        r=rank, target_modules=targets, init_lora_weights="eva", eva_config=EvaConfig()
    )
    wrapped = get_peft_model(body, config, low_cpu_mem_usage=True)
    loader = Loader(batches, seconds=60)
    ended = True

    def go() -> None:
        nonlocal ended
        try:
            get_eva_state_dict(wrapped, loader, show_progress_bar=False)
        except Late:
            ended = False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = device.seconds(go)
    wrapped.unload()
    return {
        "eva_seconds": taken,
        "eva_forward_passes": loader.passes,
        "eva_ended": ended,
        "times_faster_than_eva": taken / own,
    }


def training(device: Device, model: nn.Module, batch: Any, rank: int) -> dict[str, Any]:
    """Compare one training step, frozen and shared projections against LoRA and DoRA."""
    from peft import LoraConfig, get_peft_model

    targets = list(select_layers(model.model, "all-linear"))
    labels = {"labels": batch["input_ids"]}
    figures: dict[str, Any] = {}

    def measure(name: str, adapted: nn.Module) -> None:
        parameters = [p for p in adapted.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=1e-4)

        def step() -> None:
            optimiser.zero_grad()
            adapted(**batch, **labels).loss.backward()
            optimiser.step()

        taken = device.in_turns({name: step}, 5)[name]
        figures[name] = {"seconds": taken, "peak_bytes": device.peak_bytes(step)}

    projectors = fit_projectors(model.model, [batch], rank, targets=targets, progress=False)
    attach(model.model, projectors)
    measure("ipa", model.train())
    detach(model.model)
    for name, dora in (("lora", False), ("dora", True)):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, use_dora=dora)
        body = copy.copy(model)
        adapted = get_peft_model(body, config)
        measure(name, adapted.train())
        adapted.unload()
    for name in ("lora", "dora"):
        figures[name]["time_ratio"] = figures["ipa"]["seconds"] / figures[name]["seconds"]
        if (peak := figures[name]["peak_bytes"]) is not None:
            figures[name]["memory_ratio"] = figures["ipa"]["peak_bytes"] / peak
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=8, help="of LLaMA-3-8B's 32")
    parser.add_argument("--rehearse", action="store_true", help="tiny, anywhere, nothing written")
    args = parser.parse_args()
    device, tiny = Device(), args.rehearse
    if device.name != "cuda" and not tiny:
        raise SystemExit("expected a CUDA device, got none; --rehearse runs without one")
    torch.manual_seed(0)
    rank = 4 if tiny else RANK
    results: dict[str, Any] = {"device": device.describe()}
    results["roofline"] = roofline(device, 256 if tiny else 8192)
    results["learners"] = learners(device, *((128, 256, 4) if tiny else (4096, 8192, 64)))
    model = llama(2 if tiny else args.blocks, tiny, device)
    results["blocks"] = model.config.num_hidden_layers
    batches = tokens(model, *((2, 2, 16) if tiny else (8, 8, 1024)))
    results["learning"] = learning(device, model, batches, rank)
    results["training"] = training(
        device, model, tokens(model, 1, 2, 16 if tiny else 1024)[0], rank
    )
    for name, figures in results.items():
        print(name, figures, flush=True)
    if not tiny:
        record.write("gpu", False, PACKAGES, results)


if __name__ == "__main__":
    main()
