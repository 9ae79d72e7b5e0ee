"""Task protocol of the runner, and batches of similar length."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.evidence.cutting import Batch


@dataclass(frozen=True)
class Settings:
    """Settings shared by all methods."""

    rank: int = 8
    steps: int = 100  # forward and backward passes, those spent on P included
    batch_size: int = 32
    learn_from: int = 320  # training examples that P is chosen from
    charged: bool = True  # whether passes spent on P are taken off the steps
    warmup: float = 0.1
    head_rate: float = 3e-3


@dataclass(frozen=True)
class Example:
    """Input of the upper blocks, of shape (positions, width), and its label."""

    hidden: torch.Tensor
    label: torch.Tensor  # () for a class, (positions,) for tokens, -100 where none is wanted


class Task(Protocol):
    """Data and model: equal for all methods."""

    name: str

    def fresh(self, seed: int) -> nn.Module:
        """Return the model to adapt: `body` takes the adapters; the rest, if any, is a head."""

    def training(self, seed: int) -> Sequence[Example]:
        """Return the training examples of a seed."""

    def of_texts(self, name: str, seed: int) -> Sequence[Example]:
        """Return texts by name, of this task or another, for P; their labels are of no use."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss of a batch as `collate` makes it."""

    def size(self, part: str) -> int:
        """Return how many examples a part has, all its sets together."""

    def accuracy(self, model: nn.Module, part: str) -> dict[str, float]:
        """Return the accuracy on each set of a part, "validation" or "test"."""


def run(body: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the last hidden states of the body for a batch as `collate` makes it."""
    return body(
        inputs_embeds=batch["inputs_embeds"], attention_mask=batch["attention_mask"]
    ).last_hidden_state


def collate(examples: Sequence[Example]) -> Batch:
    """Return a padded batch."""
    hidden = pad_sequence([example.hidden for example in examples], batch_first=True)
    lengths = torch.tensor([len(example.hidden) for example in examples], device=hidden.device)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    labels = [example.label for example in examples]
    of_tokens = labels[0].ndim > 0
    return {
        "inputs_embeds": hidden,
        "attention_mask": (places < lengths[:, None]).long(),
        "labels": (
            pad_sequence(labels, batch_first=True, padding_value=-100)
            if of_tokens
            else torch.stack(labels)
        ),
    }


def by_length(examples: Sequence[Example]) -> list[int]:
    """Return the places of the examples, short ones first."""
    return sorted(range(len(examples)), key=lambda place: len(examples[place].hidden))


def sample(examples: Sequence[Example], size: int, count: int, seed: int) -> list[Batch]:
    """Return batches of `count` different examples, those of about equal length together."""
    drawn = random.Random(seed).sample(list(examples), min(count, len(examples)))
    drawn.sort(key=lambda example: len(example.hidden))
    return [collate(drawn[start : start + size]) for start in range(0, len(drawn), size)]


def batches(examples: Sequence[Example], size: int, count: int, seed: int) -> Iterator[Batch]:
    """Yield random batches of examples of about equal length: little of them is padding."""
    generator = random.Random(seed)
    pool = min(len(examples), 10 * size)
    given = 0
    while given < count:
        drawn = generator.sample(range(len(examples)), pool)
        drawn.sort(key=lambda place: len(examples[place].hidden))
        starts = list(range(0, pool - size + 1, size))
        generator.shuffle(starts)
        for start in starts[: count - given]:
            yield collate([examples[place] for place in drawn[start : start + size]])
        given += len(starts)
