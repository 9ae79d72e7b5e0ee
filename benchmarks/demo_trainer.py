"""Learn P for SmolLM2, fine-tune by transformers.Trainer: python -m benchmarks.demo_trainer."""

import argparse
import json
import random
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import ipa_hf
from benchmarks.assets import EVALS, AssetError, fetch, smollm2

RANK, RATE, SEED = 8, 3e-3, 0


@dataclass(frozen=True)
class Question:
    """A question of Social IQa, its three answers, and which is right."""

    text: str
    answers: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Size:
    """How much is done."""

    steps: int
    batch: int
    learn_from: int
    test: int


FULL, QUICK = Size(steps=40, batch=8, learn_from=128, test=100), Size(2, 2, 8, 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output/smollm2"))
    parser.add_argument("--quick", action="store_true", help="two steps, to see that it runs")
    arguments = parser.parse_args()
    try:
        folder, questions = smollm2(), social_iqa()
    except AssetError as error:
        print(error)
        return 1
    run(folder, questions, QUICK if arguments.quick else FULL, arguments.out)
    return 0


def run(folder: Path, questions: list[Question], size: Size, out: Path) -> PeftModel:
    """Learn P, train B, export; return the trained model."""
    random.Random(SEED).shuffle(questions)
    test, train = questions[: size.test], questions[size.test :]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [encoded(tokenizer, question, question.right) for question in train]
    base = AutoModelForCausalLM.from_pretrained(folder)
    before = accuracy(base, tokenizer, test)

    # The adapter exists before the trainer makes its optimizer.
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    starts = range(0, size.learn_from, size.batch)
    batches = [collate(rows[start : start + size.batch]) for start in starts]
    plain = logits(base, batches[0])
    model = ipa_hf.get_ipa_model(base, lora, batches)
    print(f"Logits change by at most {float((logits(model, batches[0]) - plain).abs().max()):.1e}.")
    model.print_trainable_parameters()

    arguments = TrainingArguments(
        str(out / "checkpoints"),
        max_steps=size.steps,
        per_device_train_batch_size=size.batch,
        learning_rate=RATE,
        warmup_steps=size.steps // 10,
        save_strategy="no",
        report_to=[],
        seed=SEED,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()

    after = accuracy(model, tokenizer, test)
    ipa_hf.export_lora(model, out / "adapter")
    for name, value in (("before", before), ("after", after)):
        error = (value * (1 - value) / len(test)) ** 0.5
        print(f"Social IQa, {len(test)} questions, {name}: {100 * value:.1f} ± {100 * error:.1f} %")
    print(f"Written: {out / 'adapter'}, which plain PEFT and LoRA servers load.")
    return model


def social_iqa() -> list[Question]:
    """Read the questions out of the package that holds them."""
    with zipfile.ZipFile(fetch(EVALS)) as archive:
        name = "evals/registry/data/theory_of_mind/socialiqa/test.jsonl"
        lines = archive.read(name).decode("utf-8").splitlines()
    questions = []
    for line in lines:
        row = json.loads(line)
        text, *answers = re.split(r"[;.?]? [ABC]: ", row["input"][-1]["content"].rstrip("."))
        if len(answers) == 3:
            questions.append(Question(text, tuple(answers), "ABC".index(row["ideal"])))
    return questions


def encoded(tokenizer: Any, question: Question, answer: int) -> dict[str, torch.Tensor]:
    """Return tokens of a question and one answer; only the answer's have labels."""
    prompt = tokenizer(f"Question: {question.text}?\nAnswer:")["input_ids"]
    reply = tokenizer(f" {question.answers[answer]}.")["input_ids"]
    return {
        "input_ids": torch.tensor(prompt + reply),
        "labels": torch.tensor([-100] * len(prompt) + reply),
    }


def collate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**batch).logits


def accuracy(model: nn.Module, tokenizer: Any, questions: Iterable[Question]) -> float:
    """Return how often the right answer has the best mean log-likelihood of its tokens."""
    hits = [int(choice(model, tokenizer, question) == question.right) for question in questions]
    return sum(hits) / len(hits)


def choice(model: nn.Module, tokenizer: Any, question: Question) -> int:
    batch = collate([encoded(tokenizer, question, answer) for answer in range(3)])
    losses = nn.functional.cross_entropy(
        logits(model, batch)[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    return int((losses.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)).argmin())


if __name__ == "__main__":
    raise SystemExit(main())
