"""Short texts for MiniLM; features are the mean of the last hidden states over the tokens."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn

from benchmarks.assets import adjectives, minilm, movie_reviews, sarcastic_headlines
from benchmarks.evidence.cutting import Batch, blocks_of, cut, entering
from benchmarks.evidence.labeled import Labeled
from benchmarks.evidence.questions import social_iqa
from benchmarks.evidence.task import Example, run

Row = tuple[str, int]

SOURCES: dict[str, Callable[[], list[Row]]] = {
    "headlines": sarcastic_headlines,
    "reviews": movie_reviews,
    "adjectives": adjectives,
}
#: Texts that P alone is chosen from: questions about people, beside all the tasks.
UNLABELED: dict[str, Callable[[], list[Row]]] = {
    "social_iqa": lambda: [(question.instruction, 0) for question in social_iqa()],
}
LONGEST = 64  # tokens
POOL, TRAINING, VALIDATION, TEST = 6000, 2000, 1000, 2000
OTHERS = (1000, 1000, 1, 1)


def pooled(body: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the mean of the last hidden states over the tokens, shape (batch, width)."""
    mask = batch["attention_mask"].unsqueeze(-1).float()
    return (run(body, batch) * mask).sum(1) / mask.sum(1)


class TextTask(Labeled):
    """Classification of a set of texts.

    Parameters
    ----------
    name : str
        Of `SOURCES`, if no rows are given.
    adapted : int
        How many of the upper blocks are adapted.
    rows, folder, sizes : optional
        Other texts, another encoder, other sizes: (pool, training, validation, test).
    """

    def __init__(
        self,
        name: str,
        *,
        adapted: int = 3,
        rows: Sequence[Row] | None = None,
        folder: Path | None = None,
        sizes: tuple[int, int, int, int] = (POOL, TRAINING, VALIDATION, TEST),
    ) -> None:
        self._adapted = adapted
        self._others: dict[str, Sequence[Example]] = {}
        self._folder = folder = folder or minilm()
        rows = list(dict(SOURCES[name]() if rows is None else rows).items())  # no text twice
        random.Random(0).shuffle(rows)
        pool, training, validation, test = sizes
        model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
        model.requires_grad_(False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        first = len(blocks_of(model)[1]) - adapted
        examples = _entering(model, tokenizer, rows[: pool + validation + test], first)
        body = cut(model, first, _tokens(tokenizer, [text for text, _ in rows[:4]]))
        super().__init__(name, examples, (training, validation, test), body, pooled)

    def of_texts(self, name: str, seed: int) -> Sequence[Example]:
        """Return texts of a source as what enters the adapted blocks."""
        if name == self.name:
            return self.training(seed)
        if name not in self._others:
            rows = (SOURCES | UNLABELED)[name]()
            other = TextTask(
                name, adapted=self._adapted, rows=rows, folder=self._folder, sizes=OTHERS
            )
            self._others[name] = other.training(0)
        return self._others[name]


def _tokens(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str]) -> Batch:
    tokens = tokenizer(
        texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
    )
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def _entering(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: Sequence[Row],
    block: int,
) -> list[Example]:
    """Return the rows as what enters a block, in their order."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))
    examples: dict[int, Example] = {}
    for start in range(0, len(order), 100):
        places = order[start : start + 100]
        batch = _tokens(tokenizer, [rows[place][0] for place in places])
        hidden = entering(model, batch, block)
        for place, row, mask in zip(places, hidden, batch["attention_mask"], strict=True):
            examples[place] = Example(row[mask.bool()].clone(), torch.tensor(rows[place][1]))
    return [examples[place] for place in range(len(rows))]
