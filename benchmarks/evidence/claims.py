"""The paper's claims, each answered from the cells by one rule.

A claim of being better is answered "yes" if the 95 % interval of the paired difference lies above
zero, "no" if it lies below, and "not shown" otherwise. A claim of being equal is answered "yes" if
the interval lies within `MARGIN` points, "above" or "below" if it leaves zero out, and "not shown"
otherwise.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks import record
from benchmarks.evidence.cells import TUNING, Cell
from benchmarks.evidence.methods import BEYOND, LEARNED
from benchmarks.evidence.statistics import Difference, of_method, paired

#: Points of accuracy below which two methods count as equal.
MARGIN = 1.0


@dataclass(frozen=True)
class Comparison:
    """Claim that a method is better than another, or equal to it."""

    claim: str
    method: str
    other: str
    equal: bool = False


CLAIMS = [
    *(
        Comparison("IPA is above LoRA at equal rank", method, "LoRA")
        for method in ("IPA, trainable", "IPA, frozen")
    ),
    Comparison("IPA frozen equals LoRA, with half to train", "IPA, frozen", "LoRA", equal=True),
    *(
        Comparison("IPA is better than EVA, PiSSA and DoRA", method, other)
        for method in ("IPA, trainable", "IPA, frozen")
        for other in ("EVA", "PiSSA", "DoRA")
    ),
]
#: Comparisons with frozen random A that were chosen before they were run, and the first fresh seed.
FRESH = {
    ("damped gradient, frozen", "headlines"): 5,
    ("damped gradient, frozen", "reviews"): 3,
    ("damped gradient, frozen", "cifar10"): 0,
    ("IPA, frozen", "cifar10"): 0,
    # The second round.
    ("damped gradient, frozen", "adjectives"): 3,
    ("damped gradient, frozen", "mnist5k"): 0,
    ("IPA, frozen", "headlines"): 5,
    ("IPA, frozen", "reviews"): 3,
    ("IPA, frozen", "adjectives"): 3,
    ("IPA, frozen", "mnist5k"): 0,
    ("IPA, frozen", "SmolLM2-135M adjectives 150 steps"): 0,
    # The third round.
    ("half inputs, half damped gradient", "headlines"): 0,
    ("half inputs, half damped gradient", "reviews"): 0,
    ("half inputs, half damped gradient", "adjectives"): 3,
    ("half inputs, half damped gradient", "cifar10"): 0,
    ("half inputs, half damped gradient", "SmolLM2-135M adjectives 150 steps"): 0,
}
#: Frozen P of which validation data choose one for each task, as they choose the rate.
CANDIDATES = ("IPA, frozen", "damped gradient, frozen")
#: What was found beside them.
OWN = [
    *(
        Comparison("a frozen learned P is above frozen random A", method, "random A, frozen")
        for method in (
            "IPA, frozen",
            "gradient, frozen",
            "damped gradient, frozen",
            "half inputs, half damped gradient",
        )
    ),
    *(
        Comparison("a frozen P by the damped gradient equals", method, other, equal=True)
        for method in ("damped gradient, frozen", "half inputs, half damped gradient")
        for other in ("LoRA", "LoRA, half rank")
    ),
    *(
        Comparison("an idea beyond the paper is above frozen random A", method, "random A, frozen")
        for method, how in BEYOND.items()
        if not how.trainable
    ),
    *(
        Comparison("how P is learned makes no difference", method, "IPA, frozen", equal=True)
        for method in LEARNED
    ),
    Comparison("LoRA needs its rank", "LoRA", "LoRA, half rank"),
]


def table(comparisons: Sequence[Comparison], cells: Sequence[Cell]) -> str:
    """Return each comparison on each task, with its answer; what was not run is left out."""
    tasks = dict.fromkeys(cell.task for cell in cells)
    return _table(_row(one, task, cells) for one in comparisons for task in tasks)


def fresh(cells: Sequence[Cell]) -> str:
    """Return `FRESH`, on the seeds that had not been looked at when each was chosen."""
    return _table(
        _row(
            Comparison("chosen before it was run", method, "random A, frozen"),
            task,
            [cell for cell in cells if cell.seed >= first],
        )
        for (method, task), first in FRESH.items()
    )


def chosen(cells: Sequence[Cell]) -> str:
    """Return how the one of `CANDIDATES` that validation data prefer compares on each task."""
    rows = []
    for task in dict.fromkeys(cell.task for cell in cells):
        own = [cell for cell in cells if cell.task == task and cell.study == "main"]
        scores = {method: _validated(own, method) for method in CANDIDATES}
        if not all(scores.values()):
            continue
        best = max(scores, key=scores.__getitem__)
        for other in ("random A, frozen", "LoRA", "LoRA, half rank"):
            equal = other != "random A, frozen"
            claim = f"P chosen on validation data {'equals' if equal else 'is above'}"
            rows.append(_row(Comparison(claim, best, other, equal), task, own))
    return _table(rows)


def _validated(cells: Sequence[Cell], method: str) -> float:
    """Return a method's accuracy on validation data at its best rate; 0 if it has no search."""
    found: dict[float, list[float]] = {}
    for cell in cells:
        if cell.method == method and cell.seed >= TUNING:
            found.setdefault(cell.rate, []).append(cell.validated)
    return max(map(mean, found.values()), default=0.0)


def _table(rows: Iterable[list[str]]) -> str:
    header = ["claim", "difference of", "task", "points", "seeds", "answer"]
    return record.table(header, [row for row in rows if row])


def _row(one: Comparison, task: str, cells: Sequence[Cell]) -> list[str]:
    """Return a comparison on a task with its answer, nothing if fewer than two seeds were run."""
    own = [cell for cell in cells if cell.task == task and cell.study == "main"]
    methods = of_method(own, one.method), of_method(own, one.other)
    if len({cell.seed for cell in methods[0]} & {cell.seed for cell in methods[1]}) < 2:
        return []
    found = paired(*methods)
    compared = f"{one.method} - {one.other}"
    return [one.claim, compared, task, str(found), str(found.pairs), answer(found, one.equal)]


def shares(cells: Sequence[Cell]) -> str:
    """Return what P from fewer texts loses against P from all."""
    swept = [cell for cell in cells if cell.study == "share"]
    rows = []
    for task, method in dict.fromkeys((cell.task, cell.method) for cell in swept):
        own = of_method([cell for cell in swept if cell.task == task], method)
        sizes = sorted({cell.learn_from for cell in own})
        every = [cell for cell in own if cell.learn_from == sizes[-1]]
        for size in sizes[:-1]:
            found = paired([cell for cell in own if cell.learn_from == size], every)
            compared = f"{method}: P from {size} texts - from {sizes[-1]}"
            rows.append([compared, task, str(found), str(found.pairs), answer(found, equal=True)])
    return record.table(["difference of", "task", "points", "seeds", "equal?"], rows)


def answer(found: Difference, equal: bool) -> str:
    """Return what the rule above says."""
    if equal and abs(found.mean) + found.half <= MARGIN:
        return "yes"
    if not found.clear:
        return "not shown"
    above, below = ("above", "below") if equal else ("yes", "no")
    return above if found.mean > 0 else below
