"""Kinds of text whose likelihood is measured: an instruction, and a text that follows it."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.assets import bigbench, cache_folder, movie_reviews, sarcastic_headlines
from ipa_core.io.atomic_write import replace_file

Pair = tuple[str, str]


@dataclass(frozen=True)
class Corpus:
    """Pairs of an instruction and a text, no text twice, in a fixed random order."""

    name: str
    pairs: tuple[Pair, ...]

    def parts(self, sizes: tuple[int, int, int]) -> dict[str, Sequence[Pair]]:
        """Return "test", "validation" and "train" with as many pairs as wanted.

        Raises
        ------
        ValueError
            If there are fewer pairs.
        """
        training, validation, test = sizes
        if sum(sizes) > len(self.pairs):
            raise ValueError(f"expected {sum(sizes)} texts of {self.name}, got {len(self.pairs)}")
        middle = test + validation
        return {
            "test": self.pairs[:test],
            "validation": self.pairs[test:middle],
            "train": self.pairs[middle : middle + training],
        }


def headlines() -> list[Pair]:
    """Return newspaper headlines, in lower case."""
    return [("Write a newspaper headline.", text) for text, _ in sarcastic_headlines()]


def reviews() -> list[Pair]:
    """Return sentences of film reviews."""
    return [("Write a sentence of a film review.", text) for text, _ in movie_reviews()]


def steps() -> list[Pair]:
    """Return instructions: a goal, and a step towards it (wikiHow, by BIG-bench)."""
    inferred = bigbench("goal_step_wikihow/goal_inference", "goal_step_wikihow/step_inference")
    pairs = []
    for name, examples in inferred.items():
        for example in examples:
            given = example["input"].split("'", 1)[1].rsplit("'", 1)[0]
            scores = example["target_scores"]
            best = max(scores, key=scores.__getitem__)
            goal, step = (best, given) if name.endswith("goal_inference") else (given, best)
            pairs.append((f"How to {goal}? Name a step.", step))
    return pairs


SOURCES: dict[str, Callable[[], list[Pair]]] = {
    "headlines": headlines,
    "reviews": reviews,
    "steps": steps,
}


def _texts(name: str) -> list[Pair]:
    """Return the texts of a kind, out of the cache if they were read before."""
    path = cache_folder() / "texts" / f"{name}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(SOURCES[name]()).encode())
    return [(instruction, text) for instruction, text in json.loads(path.read_text("utf-8"))]


def corpus(name: str) -> Corpus:
    """Return a kind of text by its name, of `SOURCES`."""
    once = {text: instruction for instruction, text in _texts(name)}
    pairs = [(instruction, text) for text, instruction in once.items()]
    random.Random(0).shuffle(pairs)
    return Corpus(name, tuple(pairs))
