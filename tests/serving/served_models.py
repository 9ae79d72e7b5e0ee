"""SmolLM2-135M with adapters that were trained for a few steps, and what transformers computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import ipa_hf
from benchmarks.assets import movie_reviews, smollm2
from ipa_torch import fit_projectors

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, STEPS, NEW_TOKENS = 8, 12, 8
TEXTS = (
    "The film begins slowly, but its second half is a delight.",
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Water boils at a temperature of one hundred degrees at sea level.",
)


@dataclass(frozen=True)
class Served:
    """A base model, exported adapters by name, prompts, and the expected answers by adapter."""

    base: Path
    adapters: dict[str, Path]
    peft_folders: dict[str, Path]
    prompts: list[list[int]]
    expected: dict[str, list[dict[str, list]]]

    def request(self) -> dict:
        """Return what a server program is asked, as JSON takes it."""
        return {
            "base": str(self.base),
            "adapters": {name: str(folder) for name, folder in self.adapters.items()},
            "prompts": self.prompts,
            "new_tokens": NEW_TOKENS,
        }


def make(folder: Path) -> Served:
    """Train two adapters with a frozen P, export them, and compute the expected answers.

    `plain` has one rank and one alpha. `ranks` has ranks that differ by layer, and rsLoRA.
    """
    torch.manual_seed(0)
    base = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    batches = _batches(tokenizer)
    expected = {"base": answers(_load(base), prompts)}
    exported, folders = {}, {}
    for name in ("plain", "ranks"):
        model = _adapted(name, _load(base), batches)
        _train(model, batches)
        folders[name], exported[name] = folder / f"peft-{name}", folder / name
        model.save_pretrained(str(folders[name]))
        ipa_hf.export_lora(model, exported[name])
        expected[name] = answers(model, prompts)
    return Served(base, exported, folders, prompts, expected)


@torch.no_grad()
def answers(model: torch.nn.Module, prompts: list[list[int]]) -> list[dict[str, list]]:
    """Return for each prompt the log-probabilities of its tokens and the greedy continuation."""
    model.eval()
    given = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logits = model(input_ids=ids).logits[0]
        scores = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        given.append({"logprobs": scores.tolist(), "tokens": tokens[0, len(prompt) :].tolist()})
    return given


def difference(given: list[dict[str, list]], expected: list[dict[str, list]]) -> float:
    """Return the largest difference of log-probabilities of the prompts' tokens."""
    return max(
        abs(ours - theirs)
        for one, other in zip(given, expected, strict=True)
        for ours, theirs in zip(one["logprobs"], other["logprobs"], strict=True)
    )


def _load(base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def _batches(tokenizer) -> list[dict[str, torch.Tensor]]:
    tokenizer.pad_token = tokenizer.eos_token
    texts = [text for text, _ in movie_reviews()[: 4 * STEPS]]
    return [
        dict(tokenizer(texts[start : start + 4], return_tensors="pt", padding=True))
        for start in range(0, len(texts), 4)
    ]


def _adapted(name: str, model: torch.nn.Module, batches: list[dict]) -> PeftModel:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    if name == "plain":
        return ipa_hf.get_ipa_model(model, config, batches, progress=False)
    config.use_rslora = True
    learned = fit_projectors(model, batches, rank=2 * RANK, targets=TARGETS, progress=False)
    learned = learned.allocate(RANK * len(learned.shared))
    return ipa_hf.get_ipa_model(model, ipa_hf.match_ranks(config, learned), learned)


def _train(model: PeftModel, batches: list[dict]) -> None:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
