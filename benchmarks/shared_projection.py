"""Adapters of 16 tasks over one P beside 16 LoRA adapters of PEFT.

    python -m benchmarks.shared_projection [--quick]

SmolLM2-135M, rank 16, all 210 linear layers of the blocks, P of movie reviews; one thread,
interleaved. Storage is the bytes of the files that `ipa_hf.save_shared` and PEFT's
`save_pretrained` write, memory the bytes of all A and B. Time is that of a forward pass with
``adapter_names=``, 16 rows of 16 tasks, in turn with PEFT's adapters and with ours on the same base
weights; the floor is the forward pass of the base model alone.
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

import ipa_hf
from benchmarks import assets, record
from benchmarks.timing import interleaved, medians, ratio
from ipa_torch import fit_projectors

TASKS = [f"task{number}" for number in range(16)]
RANK = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Tokens of each row, and turns.
LENGTHS = {"1 token a row": (1, 9), "16 tokens a row": (16, 9), "64 tokens a row": (64, 3)}
PACKAGES = ["ipa-projectors", "torch", "transformers", "peft"]


def loaded() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(assets.smollm2()).eval()


def calibration(count: int) -> list[dict[str, torch.Tensor]]:
    """Return reviews in batches of 16."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    texts = [text for text, _ in assets.movie_reviews()[: 16 * count]]
    return [
        dict(tokenizer(texts[start : start + 16], padding=True, return_tensors="pt"))
        for start in range(0, len(texts), 16)
    ]


def shared(batches: list[dict[str, torch.Tensor]]) -> PeftModel:
    model = loaded()
    projectors = fit_projectors(model, batches, RANK, targets=TARGETS, progress=False)
    return with_random_b(ipa_hf.share(model, projectors, TASKS))


def separate() -> PeftModel:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    model = get_peft_model(loaded(), config, adapter_name=TASKS[0])
    for task in TASKS[1:]:
        model.add_adapter(task, copy.deepcopy(config))
    return with_random_b(model)


@torch.no_grad()
def with_random_b(model: PeftModel) -> PeftModel:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.01)
    return model.eval()


def in_memory(model: PeftModel) -> int:
    """Return the bytes of all A and B; a shared one is a parameter once."""
    return sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)


def on_disk(save: Callable[[Path], object]) -> int:
    with TemporaryDirectory() as folder:
        save(Path(folder))
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def difference(ours: PeftModel, inputs: dict[str, Any]) -> float:
    """Return the largest difference of logits to PEFT's own loop over the same adapters."""
    plain = copy.deepcopy(ours)
    for module in plain.modules():
        if isinstance(module, LoraLayer):
            module.__class__ = type(module).__mro__[1]
    return float((ours(**inputs).logits - plain(**inputs).logits).abs().max())


@torch.no_grad()
def measure(ours: PeftModel, theirs: PeftModel, quick: bool) -> dict[str, Any]:
    sizes = {
        "storage": {"ours": on_disk(lambda folder: ipa_hf.save_shared(ours, folder))}
        | {"PEFT": on_disk(lambda folder: theirs.save_pretrained(folder))},
        "memory": {"ours": in_memory(ours), "PEFT": in_memory(theirs)},
    }
    results: dict[str, Any] = {
        "bytes": sizes,
        "storage_ratio": sizes["storage"]["ours"] / sizes["storage"]["PEFT"],
        "memory_ratio": sizes["memory"]["ours"] / sizes["memory"]["PEFT"],
        "forward": {},
    }
    for name, (length, turns) in LENGTHS.items():
        ids = torch.randint(theirs.config.vocab_size, (len(TASKS), length))
        inputs = {"input_ids": ids, "adapter_names": TASKS}
        nobody = {"input_ids": ids, "adapter_names": ["__base__"] * len(TASKS)}
        times = interleaved(
            {
                "ours": lambda inputs=inputs: ours(**inputs),
                "PEFT": lambda inputs=inputs: theirs(**inputs),
                "base": lambda nobody=nobody: theirs(**nobody),
            },
            2 if quick else turns,
        )
        results["forward"][name] = {
            "seconds": medians(times),
            "time_ratio": ratio(times, "ours", "PEFT"),
            "floor": ratio(times, "base", "PEFT"),
            "largest_difference": difference(ours, inputs),
        }
        print(name, results["forward"][name], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 turns each")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # a model of this path has no card
    results = measure(shared(calibration(2 if quick else 8)), separate(), quick)
    record.write("shared_projection", quick, PACKAGES, {"threads": 1} | results)


if __name__ == "__main__":
    main()
