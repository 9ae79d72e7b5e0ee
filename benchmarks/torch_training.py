"""What a training step and a forward pass cost with frozen, shared projections, beside PEFT.

    python -m benchmarks.torch_training [--quick]

MiniLM with a linear head, rank 16 on all linear layers of the encoder, the same batch of 32
reviews, against PEFT's LoRA and DoRA, unmerged. All take turns, so that whatever else the machine
does falls on all.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import record
from benchmarks.memory import saved_for_backward
from benchmarks.torch_learning import PACKAGES, RANK, THREADS, cut, linear, load
from ipa_torch import attach, detach, fit_projectors, merge, select_layers


class Classifier(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(384, 2)

    def forward(self, **batch: Any) -> torch.Tensor:
        return self.head(self.body(**batch).last_hidden_state[:, 0])


def stepper(model: nn.Module, batch: Any) -> Callable[[], None]:
    labels = torch.arange(batch["input_ids"].shape[0]) % 2
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> None:
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(**batch), labels).backward()
        optimiser.step()

    return step


def runner(model: nn.Module, batch: Any) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(**batch)

    return run


def in_turns(actions: dict[str, Callable[[], None]], count: int) -> dict[str, list[float]]:
    """Time actions in turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(count + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], other: str) -> float:
    return statistics.median(o / p for o, p in zip(times["ipa"], times[other], strict=True))


def main() -> None:
    from peft import LoraConfig, get_peft_model

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 steps instead of 40")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    body, tokenizer, texts = load()
    batches = cut(tokenizer, texts, 32, 8)
    targets = list(select_layers(body, linear))
    config = partial(LoraConfig, r=RANK, lora_alpha=RANK, target_modules=targets)

    models = {
        "ipa": Classifier(copy.deepcopy(body)),
        "lora": Classifier(get_peft_model(copy.deepcopy(body), config())),
        "dora": Classifier(get_peft_model(copy.deepcopy(body), config(use_dora=True))),
    }
    ipa = models["ipa"]
    ipa.requires_grad_(False)
    attach(ipa.body, fit_projectors(ipa.body, batches, RANK, targets=linear, progress=False))
    for model in models.values():
        model.train().head.requires_grad_(True)

    repeats = 5 if quick else 40
    steps = in_turns({name: stepper(m, batches[0]) for name, m in models.items()}, repeats)
    memory = {
        name: saved_for_backward(model, partial(model, **batches[0]))[1]
        for name, model in models.items()
    }
    for model in models.values():
        model.eval()
    forwards = in_turns({name: runner(m, batches[0]) for name, m in models.items()}, repeats)

    with torch.no_grad():
        before = ipa(**batches[1])
        merge(ipa.body)
        detach(ipa.body)
        difference = float((ipa(**batches[1]) - before).abs().max())

    for name in ("lora", "dora"):
        print(
            f"against {name}: step {ratio(steps, name):.3f} of its time (target 0.90), forward "
            f"{ratio(forwards, name):.3f} (target 0.90), saved for backward "
            f"{memory['ipa'] / 2**20:.0f} MiB of {memory[name] / 2**20:.0f} (target 0.90)"
        )
    print(f"merged output differs by {difference:.1e}")
    results = {
        "threads": THREADS,
        "step_ratio_median": {name: ratio(steps, name) for name in ("lora", "dora")},
        "forward_ratio_median": {name: ratio(forwards, name) for name in ("lora", "dora")},
        "step_seconds_median": {name: statistics.median(all_) for name, all_ in steps.items()},
        "forward_seconds_median": {n: statistics.median(all_) for n, all_ in forwards.items()},
        "saved_bytes": memory,
        "merged_difference": difference,
    }
    record.write("torch_training", quick, PACKAGES, results)


if __name__ == "__main__":
    main()
