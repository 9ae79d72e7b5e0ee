"""Questions answered by a causal language model: upper blocks adapted, answers scored."""

import copy
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional

from benchmarks.assets import smollm2
from benchmarks.evidence.cutting import TOLERANCE, Batch, blocks_of, cut, entering
from benchmarks.evidence.questions import Question
from benchmarks.evidence.task import Example, collate, run

#: Layers that the paper adapts, by the names of Llama and its relatives.
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

Parts = Mapping[str, Mapping[str, Sequence[Question]]]


class Speaker(nn.Module):
    """A decoder, which takes the adapters, and its output embedding, which is not copied.

    Parameters
    ----------
    body : torch.nn.Module
        The decoder without its output embedding.
    output : torch.nn.Module
        The output embedding.
    targets : sequence of str
        Last parts of the names of the layers to adapt.
    """

    def __init__(self, body: nn.Module, output: nn.Module, targets: Sequence[str]) -> None:
        super().__init__()
        self.body = body
        self.output = output
        self.targets = tuple(targets)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return negative log-likelihoods of the wanted tokens, and the row each belongs to.

        Logits are computed where a token is wanted only: with a large vocabulary and few wanted
        tokens they would take as long as many blocks.
        """
        wanted = batch["labels"][:, 1:]
        row, place = (wanted != -100).nonzero(as_tuple=True)
        hidden = run(self.body, batch)[row, place]
        losses = functional.cross_entropy(
            self.output(hidden).float(), wanted[row, place], reduction="none"
        )
        return losses, row


class LanguageTask:
    """Questions of several sets; trained on a mixture of them, tested on each.

    Parameters
    ----------
    name : str
    parts : mapping
        "train", "validation" and "test", each from the names of sets to questions.
    adapted : int, optional
        How many of the upper blocks are adapted; all by default.
    folder : Path, optional
        Any causal language model of transformers with its tokenizer; SmolLM2-135M by default.
    targets : sequence of str
        Last parts of the names of the layers to adapt.
    on_prompt : bool
        Whether the loss is on the prompt too, as in the paper, or on the answer only.
    share : float
        Of the training questions that each seed takes.
    longest : int
        Tokens of prompt and answer; what is longer loses its beginning.
    dtype : torch.dtype
        Of the model; adapters are float32.
    """

    def __init__(
        self,
        name: str,
        parts: Parts,
        *,
        adapted: int | None = None,
        folder: Path | None = None,
        targets: Sequence[str] = TARGETS,
        on_prompt: bool = False,
        share: float = 0.8,
        longest: int = 256,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.name = name
        folder = folder or smollm2()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._full_model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self._full_model.requires_grad_(False)
        blocks = blocks_of(self._full_model)[1]
        self._first = len(blocks) - (adapted or len(blocks))
        self._targets, self._on_prompt = targets, on_prompt
        self._share, self._longest = share, longest
        self._questions = parts
        some = [next(iter(rows)) for rows in parts["train"].values()]
        batch = self._tokens([self._encoded(question, question.right) for question in some])
        upper = cut(copy.deepcopy(self._full_model), self._first, batch)
        self._body, self._output = upper.base_model, upper.get_output_embeddings()
        self._check(batch)
        for part in (self._body, self._output, self._full_model):
            part.to(dtype)
        self._pool = self._entering(
            [(question, question.right) for rows in parts["train"].values() for question in rows]
        )
        self._choices = {
            part: {name: self._all_choices(rows) for name, rows in parts[part].items()}
            for part in ("validation", "test")
        }

    def training(self, seed: int) -> Sequence[Example]:
        return random.Random(seed).sample(self._pool, round(self._share * len(self._pool)))

    def of_texts(self, name: str, seed: int) -> Sequence[Example]:
        raise ValueError(f"expected a P from the task's own questions, got one from {name!r}")

    def fresh(self, seed: int) -> nn.Module:
        return Speaker(copy.deepcopy(self._body), self._output, self._targets)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(batch)[0].mean()

    def size(self, part: str) -> int:
        return sum(len(sets.answers) for sets in self._choices[part].values())

    @torch.inference_mode()
    def accuracy(self, model: nn.Module, part: str) -> dict[str, float]:
        """Return how often the right choice has the best mean log-likelihood of its tokens."""
        return {name: self._scored(model, sets) for name, sets in self._choices[part].items()}

    @torch.inference_mode()
    def accuracy_by_generation(
        self, model: nn.Module, part: str, *, beams: int = 4, new_tokens: int = 32
    ) -> dict[str, float]:
        """Return how often the right choice is the first that a generated answer names."""
        whole = self.assembled(model)
        result = {}
        for name, questions in self._questions[part].items():
            right = 0
            for question in questions:
                prompt = self._tokenizer(question.prompt, return_tensors="pt")
                made = whole.generate(
                    **prompt,
                    num_beams=beams,
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=self._tokenizer.eos_token_id,
                )
                text = self._tokenizer.decode(
                    made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
                )
                right += named(text, question.choices) == question.right
            result[name] = right / len(questions)
        return result

    def assembled(self, model: nn.Module) -> nn.Module:
        """Return the whole model with the adapted blocks of `model` in their place."""
        whole = copy.deepcopy(self._full_model)
        blocks = blocks_of(whole)[1]
        for index, block in enumerate(blocks_of(model.body)[1]):
            blocks[self._first + index] = block
            for part in block.modules():
                if getattr(part, "layer_idx", None) is not None:  # the cache's
                    part.layer_idx = self._first + index
        return whole

    def _scored(self, model: nn.Module, sets: "_Choices") -> float:
        totals = torch.zeros(len(sets.examples))
        order = sorted(
            range(len(sets.examples)), key=lambda place: len(sets.examples[place].hidden)
        )
        for start in range(0, len(order), 64):
            places = order[start : start + 64]
            losses, row = model(collate([sets.examples[place] for place in places]))
            mean = torch.zeros(len(places)).index_add(0, row, losses) / torch.bincount(
                row, minlength=len(places)
            )
            totals[places] = mean
        right, start = 0, 0
        for count, answer in zip(sets.counts, sets.answers, strict=True):
            right += int(totals[start : start + count].argmin()) == answer
            start += count
        return right / len(sets.answers)

    def _all_choices(self, questions: Sequence[Question]) -> "_Choices":
        pairs = [(question, i) for question in questions for i in range(len(question.choices))]
        return _Choices(
            self._entering(pairs, answer_only=True),
            [len(question.choices) for question in questions],
            [question.right for question in questions],
        )

    def _entering(
        self, pairs: Sequence[tuple[Question, int]], *, answer_only: bool = False
    ) -> list[Example]:
        """Return questions with one of their answers, as what enters the adapted blocks."""
        encoded = [self._encoded(question, i, answer_only) for question, i in pairs]
        order = sorted(range(len(encoded)), key=lambda place: len(encoded[place][0]))
        examples: dict[int, Example] = {}
        for start in range(0, len(order), 32):
            places = order[start : start + 32]
            batch = self._tokens([encoded[place] for place in places])
            hidden = entering(self._full_model, batch, self._first)
            for place, row, mask in zip(places, hidden, batch["attention_mask"], strict=True):
                examples[place] = Example(row[mask.bool()].clone(), encoded[place][1])
        return [examples[place] for place in range(len(encoded))]

    def _encoded(
        self, question: Question, answer: int, answer_only: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prompt = self._tokenizer(question.prompt)["input_ids"]
        reply = self._tokenizer(f" {question.choices[answer]}.", add_special_tokens=False)
        whole = torch.tensor(prompt + reply["input_ids"])
        labels = whole.clone()
        if answer_only or not self._on_prompt:
            labels[: len(prompt)] = -100
        return whole[-self._longest :], labels[-self._longest :]

    def _tokens(self, encoded: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Batch:
        """Return a padded batch of tokens; the padding's own is of no account."""
        lengths = torch.tensor([len(ids) for ids, _ in encoded])
        ids = nn.utils.rnn.pad_sequence([ids for ids, _ in encoded], batch_first=True)
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        }

    @torch.no_grad()
    def _check(self, batch: Batch) -> None:
        """Check that decoder and output embedding are all there is."""
        there = batch["attention_mask"].bool()
        wanted = self._full_model(**batch).logits[there]
        inputs = {**batch, "inputs_embeds": entering(self._full_model, batch, self._first)}
        difference = (self._output(run(self._body, inputs))[there] - wanted).abs().max()
        if not difference <= TOLERANCE * wanted.abs().max():
            raise ValueError(
                "expected logits that are the output embedding of the last hidden states, got "
                f"others from {type(self._full_model).__name__}"
            )


class _Choices:
    """All choices of a set's questions, one after the other."""

    def __init__(self, examples: list[Example], counts: list[int], answers: list[int]) -> None:
        self.examples, self.counts, self.answers = examples, counts, answers


def named(text: str, choices: Sequence[str]) -> int | None:
    """Return the choice that a text names first, the longest of those at one place; or None."""
    found: list[tuple[int, int, Any]] = []
    for index, choice in enumerate(choices):
        place = text.lower().find(choice.lower())
        if place >= 0:
            found.append((place, -len(choice), index))
    return min(found)[2] if found else None
