"""Held-out text by its likelihood: upper blocks of a causal model adapted, nats per token."""

import copy
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn

from benchmarks.assets import smollm2
from benchmarks.evidence.corpora import Corpus, Pair
from benchmarks.evidence.cutting import Batch, blocks_of, cut, entering
from benchmarks.evidence.language import TARGETS, Speaker
from benchmarks.evidence.task import Example, by_length, collate, sample

#: Of the training texts that each seed takes.
SHARE = 2 / 3
#: Tokens of a text; what is longer loses its end.
LONGEST = 64
BATCH = 40


class LikelihoodTask:
    """A kind of text to train on, and another to see what is forgotten.

    The log-likelihood is over the tokens that occur in the texts, all parts and both kinds, unless
    `full_vocabulary`: SmolLM2's output embedding of 49,152 tokens would take most of the time.

    Parameters
    ----------
    corpus, other : Corpus
        The texts, and those of another kind that are never trained on.
    sizes : (int, int, int)
        Texts to train on, for validation, for testing.
    adapted : int
        How many of the upper blocks are adapted.
    folder : Path, optional
        Any causal language model of transformers with its tokenizer; SmolLM2-135M by default.
    full_vocabulary : bool
        Whether all tokens of the vocabulary count.
    dtype : torch.dtype
        Of the model; adapters are float32.
    cache : Path, optional
        A folder for what enters the adapted blocks.
    device : str
        Of the adapted blocks and of what enters them.
    """

    def __init__(
        self,
        corpus: Corpus,
        other: Corpus,
        *,
        sizes: tuple[int, int, int],
        adapted: int = 4,
        folder: Path | None = None,
        full_vocabulary: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        cache: Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.name = ", ".join(
            [
                corpus.name,
                *["full vocabulary"] * full_vocabulary,
                *["float32"] * (dtype == torch.float32),
            ]
        )
        self.kinds = (corpus.name, other.name)
        folder = folder or smollm2()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.eval().requires_grad_(False)
        self._first = len(blocks_of(model)[1]) - adapted
        parts = corpus.parts(sizes)
        parts["other"] = other.parts(sizes)["test"][: len(parts["test"]) // 4]
        #: By part, the tokens of each text and how many are the instruction's.
        self.tokens = {part: _tokens(tokenizer, pairs) for part, pairs in parts.items()}
        known = _vocabulary(self.tokens.values())
        if full_vocabulary:
            known = torch.arange(model.config.vocab_size)
        self.vocabulary = known
        #: By part, the same texts as examples.
        self.parts = {
            part: _examples(_entering(model, rows, self._first, cache), rows, known, dtype, device)
            for part, rows in self.tokens.items()
        }
        some = _batch(self.tokens["test"][:4])
        head = model.get_output_embeddings().weight[known].clone()
        self._body = cut(model, self._first, some).base_model
        self._output = nn.Linear(head.shape[1], len(known), bias=False)
        self._output.weight = nn.Parameter(head, requires_grad=False)
        for module in (self._body, self._output):
            module.to(device, dtype)

    def fresh(self, seed: int) -> nn.Module:
        return Speaker(copy.deepcopy(self._body), self._output, TARGETS)

    def training(self, seed: int) -> Sequence[Example]:
        pool = self.parts["train"]
        return random.Random(seed).sample(pool, round(SHARE * len(pool)))

    def of_texts(self, name: str, seed: int) -> Sequence[Example]:
        raise ValueError(f"expected a P from the task's own texts, got one from {name!r}")

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(batch)[0].mean()

    def size(self, part: str) -> int:
        return len(self.parts[part])

    @torch.inference_mode()
    def likelihood(self, model: nn.Module, part: str) -> dict[str, float]:
        """Return the negative log-likelihood for each token, in nats, by kind of text.

        Parameters
        ----------
        model : torch.nn.Module
            As `fresh` returns it, with or without adapters.
        part : {"validation", "test"}
            With "test" comes what has become of the other kind.
        """
        found = {self.kinds[0]: self._nats(model, self.parts[part])}
        if part == "test":
            found[self.kinds[1]] = self._nats(model, self.parts["other"])
        return found

    def _nats(self, model: nn.Module, examples: Sequence[Example]) -> float:
        total, count = 0.0, 0
        order = by_length(examples)
        for start in range(0, len(order), BATCH):
            losses, _ = model(collate([examples[place] for place in order[start : start + BATCH]]))
            total, count = total + float(losses.double().sum()), count + len(losses)
        return total / count

    def some(self, count: int) -> list[Batch]:
        """Return validation texts in batches, for a look at the model as it is."""
        return sample(self.parts["validation"], BATCH, count, 0)


Tokens = tuple[torch.Tensor, int]


def _tokens(tokenizer: transformers.PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[Tokens]:
    """Return the tokens of instruction and text, and how many are the instruction's."""
    found = []
    for instruction, text in pairs:
        prompt = tokenizer(f"{instruction}\n")["input_ids"]
        answer = tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST]
        found.append((torch.tensor([*prompt, *answer, tokenizer.eos_token_id]), len(prompt)))
    return found


def _vocabulary(parts: Sequence[list[Tokens]]) -> torch.Tensor:
    return torch.unique(torch.cat([ids[start:] for rows in parts for ids, start in rows]))


def _batch(rows: Sequence[Tokens]) -> Batch:
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }


def _entering(
    model: nn.Module, rows: Sequence[Tokens], block: int, cache: Path | None
) -> list[torch.Tensor]:
    """Return what enters a block, shape (positions, width) for each row of tokens."""
    key = hashlib.sha256(str([ids.tolist() for ids, _ in rows]).encode()).hexdigest()[:16]
    path = None if cache is None else cache / f"{model.config.model_type}-{block}-{key}.pt"
    if path is not None and path.is_file():
        return list(torch.load(path).split([len(ids) for ids, _ in rows]))
    hidden: dict[int, torch.Tensor] = {}
    order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        entered = entering(model, _batch([rows[place] for place in places]), block)
        for place, row in zip(places, entered, strict=True):
            hidden[place] = row[: len(rows[place][0])].clone()
    found = [hidden[place] for place in range(len(rows))]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(found), path)
    return found


def _examples(
    hidden: Sequence[torch.Tensor],
    rows: Sequence[Tokens],
    known: torch.Tensor,
    dtype: torch.dtype,
    device: str,
) -> list[Example]:
    """Return examples whose labels are places in the vocabulary, the instruction's left out."""
    examples = []
    for states, (ids, start) in zip(hidden, rows, strict=True):
        labels = torch.searchsorted(known, ids).clamp_max(len(known) - 1)
        labels[:start] = -100
        examples.append(Example(states.to(device, dtype), labels.to(device)))
    return examples
