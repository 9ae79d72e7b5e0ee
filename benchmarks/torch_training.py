"""What a training step costs with frozen, shared projections, beside PEFT's LoRA.

    python -m benchmarks.torch_training [--quick]

MiniLM with a linear head, rank 16 on all linear layers of the encoder, the same batch of 32
reviews. Steps of both alternate, so that whatever else the machine does falls on both.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import record
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


def saved_bytes(model: nn.Module, batch: Any) -> int:
    """Bytes of distinct storages that the backward pass keeps, weights apart."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**batch)
        total = sum(kept.values())
        del output
    return total


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

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    lora = Classifier(get_peft_model(copy.deepcopy(body), config)).train()
    ipa = Classifier(copy.deepcopy(body)).train()
    ipa.requires_grad_(False)
    attach(ipa.body, fit_projectors(ipa.body, batches, RANK, targets=linear, progress=False))
    for model in (lora, ipa):
        model.head.requires_grad_(True)

    steps = {"lora": stepper(lora, batches[0]), "ipa": stepper(ipa, batches[0])}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for count in range(5 if quick else 40):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if count:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    pairs = zip(times["ipa"], times["lora"], strict=True)
    ratio = statistics.median(own / other for own, other in pairs)
    memory = {"lora": saved_bytes(lora, batches[0]), "ipa": saved_bytes(ipa, batches[0])}

    ipa.eval()
    with torch.no_grad():
        before = ipa(**batches[1])
        merge(ipa.body)
        detach(ipa.body)
        difference = float((ipa(**batches[1]) - before).abs().max())

    print(
        f"step {1e3 * statistics.median(times['ipa']):.0f} ms against LoRA's "
        f"{1e3 * statistics.median(times['lora']):.0f} ms, median ratio {ratio:.3f} (target 0.95); "
        f"saved for backward {memory['ipa'] / 2**20:.0f} MiB against "
        f"{memory['lora'] / 2**20:.0f} MiB; merged output differs by {difference:.1e}"
    )
    results = {
        "threads": THREADS,
        "ratio_median": ratio,
        "step_seconds_median": {name: statistics.median(all_) for name, all_ in times.items()},
        "step_seconds_least": {name: min(all_) for name, all_ in times.items()},
        "saved_bytes": memory,
        "merged_difference": difference,
    }
    record.write("torch_training", quick, PACKAGES, results)


if __name__ == "__main__":
    main()
