"""Classification: upper blocks adapted, features of the last hidden states, a linear head."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional

from benchmarks.evidence.cutting import Batch
from benchmarks.evidence.task import Example, by_length, collate, sample

#: Features of a batch, shape (batch, width), by the upper blocks.
Features = Callable[[nn.Module, Batch], torch.Tensor]


class Classifier(nn.Module):
    """Upper blocks, which take the adapters, and a linear head on features of what they give."""

    def __init__(self, body: nn.Module, features: Features, width: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.features = features
        self.head = nn.Linear(width, classes)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.head(self.features(self.body, batch))


class Labeled:
    """Classification task: inputs of the upper blocks, with labels. Training rows vary by seed.

    Parameters
    ----------
    name : str
    examples : sequence of Example
        Of the test part first, then of the validation part, then those to train on.
    sizes : (int, int, int)
        Training rows of a seed, rows of the validation part and of the test part.
    body : torch.nn.Module
        The upper blocks.
    features : callable
        Features of a batch, by the body.
    """

    def __init__(
        self,
        name: str,
        examples: Sequence[Example],
        sizes: tuple[int, int, int],
        body: nn.Module,
        features: Features,
    ) -> None:
        self.name = name
        self._training, validation, test = sizes
        self._parts = {
            "test": examples[:test],
            "validation": examples[test : test + validation],
        }
        self._pool = examples[test + validation :]
        self._width = examples[0].hidden.shape[1]
        self._classes = 1 + max(int(example.label) for example in examples)
        self._body, self._features = body, features
        self._heads: dict[int, dict[str, torch.Tensor]] = {}

    def training(self, seed: int) -> Sequence[Example]:
        return random.Random(seed).sample(self._pool, min(self._training, len(self._pool)))

    def of_texts(self, name: str, seed: int) -> Sequence[Example]:
        if name != self.name:
            raise ValueError(f"expected a P from {self.name!r} itself, got one from {name!r}")
        return self.training(seed)

    def fresh(self, seed: int) -> nn.Module:
        """Return the blocks with a head that was trained for a moment on what they give.

        A choice by the gradient needs such a head; all methods get the same one.
        """
        torch.manual_seed(seed)
        model = Classifier(copy.deepcopy(self._body), self._features, self._width, self._classes)
        if seed not in self._heads:
            self._heads[seed] = self._warm_head(model, seed)
        model.head.load_state_dict(self._heads[seed])
        return model

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(model(batch), batch["labels"])

    def size(self, part: str) -> int:
        return len(self._parts[part])

    def accuracy(self, model: nn.Module, part: str) -> dict[str, float]:
        right = sum(
            int((logits.argmax(-1) == labels).sum()) for logits, labels in self._logits(model, part)
        )
        return {self.name: right / self.size(part)}

    def nats(self, model: nn.Module, part: str) -> dict[str, float]:
        """Return the mean negative log-likelihood of the labels of a part, in nats."""
        total = sum(
            float(functional.cross_entropy(logits, labels, reduction="sum"))
            for logits, labels in self._logits(model, part)
        )
        return {self.name: total / self.size(part)}

    @torch.inference_mode()
    def _logits(self, model: nn.Module, part: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield logits and labels of a part, in batches."""
        examples = self._parts[part]
        order = by_length(examples)
        for start in range(0, len(order), 100):
            batch = collate([examples[place] for place in order[start : start + 100]])
            yield model(batch), batch["labels"]

    def _warm_head(self, model: Classifier, seed: int) -> dict[str, torch.Tensor]:
        some = sample(self.training(seed), 32, 320, seed)
        with torch.no_grad():
            features = torch.cat([model.features(model.body, batch) for batch in some])
        labels = torch.cat([batch["labels"] for batch in some])
        optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(50):
            loss = functional.cross_entropy(model.head(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {name: value.clone() for name, value in model.head.state_dict().items()}
