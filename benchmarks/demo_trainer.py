"""Learn P for SmolLM2, fine-tune by transformers.Trainer: python -m benchmarks.demo_trainer."""

import argparse
import json
import random
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import ipa_hf
from benchmarks import record
from benchmarks.assets import EVALS, AssetError, fetch, smollm2

RANK, RATE, SEED = 8, 3e-3, 0
PACKAGES = ["ipa-projectors", "peft", "torch", "transformers"]

# What a server without our packages does.
STOCK = """
import sys, warnings
for name in ("benchmarks", "ipa_core", "ipa_torch", "ipa_hf", "ipa_timm"):
    sys.modules[name] = None  # importing it now fails
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

base, adapter, inputs, outputs = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits}, outputs)
"""


@dataclass(frozen=True)
class Question:
    """A question of Social IQa, its three answers, and which is right."""

    text: str
    answers: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Size:
    """Number of steps and examples of a run."""

    steps: int
    batch: int
    learn_from: int
    test: int


FULL, QUICK = Size(steps=120, batch=8, learn_from=128, test=400), Size(2, 2, 8, 4)


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
    results = run(folder, questions, QUICK if arguments.quick else FULL, arguments.out)
    record.write("demo_trainer", arguments.quick, PACKAGES, results)
    return 0


def run(folder: Path, questions: list[Question], size: Size, out: Path) -> dict[str, Any]:
    """Learn P, train B, export, load by stock PEFT; return what was measured."""
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
    start = time.perf_counter()
    model = ipa_hf.get_ipa_model(base, lora, batches)
    learning = time.perf_counter() - start
    change = distance(logits(model, batches[0]), plain)
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
    start = time.perf_counter()
    Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
    training = time.perf_counter() - start

    after = accuracy(model, tokenizer, test)
    ipa_hf.export_lora(model, out / "adapter")
    served = distance(logits(model, batches[0]), stock_logits(folder, out, batches[0]))
    for name, value in (("before", before), ("after", after)):
        error = (value * (1 - value) / len(test)) ** 0.5
        print(f"Social IQa, {len(test)} questions, {name}: {100 * value:.1f} ± {100 * error:.1f} %")
    print(f"Logits changed by at most {change:.1e} when the adapter was put in.")
    print(f"Written: {out / 'adapter'}; loaded by stock PEFT, its logits differ by {served:.1e}.")
    return {
        "size": asdict(size) | {"rank": RANK, "learning_rate": RATE},
        "layers": len(ipa_hf.adapter_metadata.AdapterMetadata.read(out / "adapter").layers),
        "accuracy": {"before": before, "after": after},
        "seconds": {"learning": learning, "training": training},
        "initial_logits_change": change,
        "stock_peft_logits_difference": served,
    }


def stock_logits(folder: Path, out: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits that PEFT alone computes from the exported adapter, in its own process."""
    inputs, outputs = out / "batch.safetensors", out / "logits.safetensors"
    save_file(batch, inputs)
    command = [sys.executable, "-I", "-c", STOCK, folder, out / "adapter", inputs, outputs]
    subprocess.run(list(map(str, command)), check=True)
    return load_file(outputs)["logits"]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


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
