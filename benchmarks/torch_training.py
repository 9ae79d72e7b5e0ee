"""Time and memory of training steps and forward passes with shared projections, beside PEFT.

    python -m benchmarks.torch_training [--quick]

MiniLM in float32 and in bfloat16 with a linear head, rank 16 on all linear layers of the encoder,
the same batch of 32 reviews, against PEFT's LoRA and DoRA, unmerged. Runs are interleaved,
so that other load on the machine affects all of them. The floor has the operations of all matrix
products at the speed of a large one; of memory, what a gradient through the frozen model keeps, and
P x.
"""

import argparse
import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floor, record
from benchmarks.floor import Machine
from benchmarks.memory import saved_for_backward
from benchmarks.timing import Action, interleaved, medians, ratio
from benchmarks.torch_learning import PACKAGES, RANK, THREADS, cut, linear, load
from ipa_torch import LayerProjectors, attach, detach, fit_projectors, merge


class Classifier(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(384, 2)

    def forward(self, **batch: Any) -> torch.Tensor:
        return self.head(self.body(**batch).last_hidden_state[:, 0].float())


def stepper(model: nn.Module, batch: Any) -> Action:
    labels = torch.arange(batch["input_ids"].shape[0]) % 2
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(**batch), labels).backward()
        optimizer.step()

    return step


def runner(model: nn.Module, batch: Any) -> Action:
    def run() -> None:
        with torch.no_grad():
            model(**batch)

    return run


def operations(action: Action) -> int:
    """Count the operations of all matrix products."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def saved_at_least(body: nn.Module, batch: Any, projections: int) -> int:
    """Return the bytes that a gradient through the frozen model keeps, and one P x an input."""
    bare = Classifier(copy.deepcopy(body)).requires_grad_(False).train()
    bare.body.get_submodule("embeddings").register_forward_hook(
        lambda module, given, output: output.requires_grad_()
    )
    _, kept = saved_for_backward(bare, partial(bare, **batch))
    size = next(body.parameters()).element_size()
    return kept + size * RANK * batch["input_ids"].numel() * projections


def compare(
    body: nn.Module, batches: list[Any], projectors: LayerProjectors, repeats: int, machine: Machine
) -> dict[str, Any]:
    """Let the frozen projections take turns with LoRA and DoRA; in the end, merge them."""
    from peft import LoraConfig, get_peft_model

    targets = list(projectors)
    config = partial(LoraConfig, r=RANK, lora_alpha=RANK, target_modules=targets)
    models = {
        "ipa": Classifier(copy.deepcopy(body)),
        "lora": Classifier(get_peft_model(copy.deepcopy(body), config())),
        "dora": Classifier(get_peft_model(copy.deepcopy(body), config(use_dora=True))),
    }
    ipa = models["ipa"]
    ipa.requires_grad_(False)
    attach(ipa.body, projectors)
    for model in models.values():
        model.train().head.requires_grad_(True)

    least = {"step": operations(stepper(ipa, batches[0]))}
    steps = interleaved({name: stepper(m, batches[0]) for name, m in models.items()}, repeats)
    memory = {
        name: saved_for_backward(model, partial(model, **batches[0]))[1]
        for name, model in models.items()
    }
    for model in models.values():
        model.eval()
    least["forward"] = operations(runner(ipa, batches[0]))
    forwards = interleaved({name: runner(m, batches[0]) for name, m in models.items()}, repeats)
    with torch.no_grad():
        before = ipa(**batches[1])
        merge(ipa.body)
        detach(ipa.body)
        difference = float((ipa(**batches[1]) - before).abs().max())

    seconds = {"step": medians(steps), "forward": medians(forwards)}
    saved = saved_at_least(body, batches[0], len(projectors.shared))
    return {
        "machine_floor": machine.record(),
        "operations": least,
        "floors": {
            f"{what}, {name}": machine.seconds(least[what]) / seconds[what][name]
            for what in seconds
            for name in ("lora", "dora")
        }
        | {"saved": saved / memory["lora"]},
        "step_ratio_median": {name: ratio(steps, "ipa", name) for name in ("lora", "dora")},
        "forward_ratio_median": {name: ratio(forwards, "ipa", name) for name in ("lora", "dora")},
        "step_seconds_median": seconds["step"],
        "forward_seconds_median": seconds["forward"],
        "saved_bytes": memory,
        "merged_difference": difference,
    }


def show(name: str, found: dict[str, Any]) -> None:
    saved = found["saved_bytes"]
    for other in ("lora", "dora"):
        print(
            f"{name}, against {other}: step {found['step_ratio_median'][other]:.3f} of its time "
            f"(target 0.90), forward {found['forward_ratio_median'][other]:.3f} (target 0.90), "
            f"saved for backward {saved['ipa'] / 2**20:.0f} MiB of {saved[other] / 2**20:.0f} "
            "(target 0.90)"
        )
    print(f"merged output differs by {found['merged_difference']:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 steps instead of 40")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    body, tokenizer, texts = load()
    batches, repeats = cut(tokenizer, texts, 32, 8), 5 if quick else 40
    projectors = fit_projectors(body, batches, RANK, targets=linear, progress=False)
    results = compare(body, batches, projectors, repeats, floor.machine())
    show("float32", results)
    machine = floor.machine(dtype=torch.bfloat16)
    half = compare(body.bfloat16(), batches, projectors, repeats, machine)
    show("bfloat16", half)
    results["floors"] |= {f"bfloat16 {what}": value for what, value in half.pop("floors").items()}
    record.write(
        "torch_training", quick, PACKAGES, {"threads": THREADS} | results | {"bfloat16": half}
    )


if __name__ == "__main__":
    main()
