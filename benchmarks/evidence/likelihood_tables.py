"""Tables of the likelihood of held-out text, in nats per token: small figures are good."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import mean

from benchmarks import record
from benchmarks.evidence.cells import Cell
from benchmarks.evidence.likelihood_methods import LIKELIHOOD
from benchmarks.evidence.statistics import (
    Difference,
    mean_and_deviation,
    of_method,
    paired,
    pooled,
)

STUDY = "likelihood"
#: Study of the likelihood of labels, by a classifier.
CLASSIFICATION = "loss"
LORA, RANDOM = "LoRA", "random A, frozen"
#: Settings of the main comparison: rank, steps, texts that P is chosen from.
MAIN = (8, 80, 128)
#: Nats beyond its interval that make a difference worth a name.
LEAST = 0.005
HEADER = [
    "method",
    "trainable",
    "nats",
    "seeds",
    "to LoRA",
    "to random A, frozen",
    "share of the gap",
    "other kind",
    "rate",
    "steps for P",
]
#: Differences that were written down before they were run, with what confirms them.
CHOSEN = [
    ("IPA without first token, frozen", "random A, frozen"),
    ("IPA without first token, frozen", "IPA, frozen"),
    ("IPA without first token, frozen", "LoRA"),
    ("IPA without first token, frozen", "LoRA, half rank"),
    ("IPA without first token, rank doubled, frozen", "LoRA"),
    ("IPA without first token, trainable", "LoRA"),
    ("IPA without first token, trainable", "EVA"),
    ("IPA, trainable", "EVA"),
    ("IPA, frozen", "random A, frozen"),
    ("IPA without first token, first step, frozen", "IPA without first token, frozen"),
    ("IPA without first token, first step, frozen", "random A, frozen"),
    ("IPA without first token, first step, frozen", "LoRA"),
    ("IPA without first token, first step, frozen", "LoRA, half rank"),
    ("IPA without first token, first step, frozen", "random A, first step, frozen"),
    ("IPA without first token, first sign step, frozen", "random A, first sign step, frozen"),
    *[(trained, LORA) for trained in ("PiSSA", "EVA", "DoRA", "LoRA, rate of B 4 times A's")],
    *[
        (f"inputs and gradient, beta {beta}, frozen", other)
        for beta in (0.1, 1, 10)
        for other in ("IPA without first token, frozen", "damped gradient, frozen", LORA)
    ],
    ("IPA unit rows, frozen", "IPA without first token, frozen"),
    ("damped gradient, frozen", RANDOM),
    ("orthonormal, frozen", RANDOM),
    *[
        (f"IPA without first token, {kind}, trainable", other)
        for kind in ("long rows", "a tenth of B's rate")
        for other in ("IPA without first token, trainable", "EVA", LORA)
    ],
    ("EVA, equal ranks", "EVA"),
    ("EVA, equal ranks", LORA),
    ("IPA without first token, trainable", "EVA, equal ranks"),
    ("IPA without first token, long rows, trainable", "EVA, equal ranks"),
    ("LoRA, upper half of the blocks", LORA),
    ("IPA without first token, frozen", "LoRA, upper half of the blocks"),
]


def tables(cells: Iterable[Cell]) -> dict[str, str]:
    """Return the tables by a name for the file: each kind of text, differences, classification."""
    cells = list(cells)
    own = [cell for cell in cells if cell.study == STUDY and _settings(cell) == MAIN]
    tested = tested_cells(own)
    found = {}
    tasks = list(dict.fromkeys(cell.task for cell in tested))
    for task in tasks:
        name = task.replace(", ", "_").replace(" ", "_")
        found[name] = comparison([cell for cell in tested if cell.task == task])
    if tasks:
        found["differences"] = differences(tested, tasks)
        found["resolved"] = resolved(tested, tasks)
    tuned = [cell for cell in own if cell.test is None]
    if tuned:
        found["validation"] = validation(tuned)
    classified = [cell for cell in cells if cell.study == CLASSIFICATION and cell.test]
    if classified:
        found["classification"] = classification(classified)
    return found


def tested_cells(cells: Iterable[Cell], settings: tuple[int, int, int] = MAIN) -> list[Cell]:
    """Return the tested cells of some settings, by default of the main comparison.

    Where a kind of text was tested at the rate of headlines before rates were tried there, the
    cells at its best rate are taken.
    """
    own = [cell for cell in cells if cell.study == STUDY and _settings(cell) == settings]
    tuned: dict[tuple[str, str], list[Cell]] = {}
    for cell in own:
        if cell.test is None:
            tuned.setdefault((cell.task, cell.method), []).append(cell)
    best = {key: min(some, key=validated).rate for key, some in tuned.items() if len(some) >= 3}
    return [
        cell
        for cell in own
        if cell.test is not None and cell.rate == best.get((cell.task, cell.method), cell.rate)
    ]


def compared(own: Sequence[Cell], lora: Sequence[Cell], random: Sequence[Cell]) -> list[str]:
    """Return a method's nats, seeds, differences to LoRA and random A, and share of the gap."""
    return [
        spread([nats(cell) for cell in own]),
        str(len(own)),
        difference(own, lora),
        difference(own, random),
        share_of_gap(own, lora, random),
    ]


def comparison(cells: Sequence[Cell]) -> str:
    """Return nats, differences and costs of the methods that have been tested on one kind."""
    lora, random = of_method(cells, LORA), of_method(cells, RANDOM)
    rows = []
    for method in LIKELIHOOD:
        own = of_method(cells, method)
        if own:
            rows.append(
                [
                    method,
                    f"{own[0].trainable:,}",
                    *compared(own, lora, random),
                    spread([forgotten(cell) for cell in own]),
                    f"{own[0].rate:g}",
                    f"{mean(cell.steps_of_p for cell in own):.0f}",
                ]
            )
    return record.table(HEADER, rows)


def classification(cells: Sequence[Cell]) -> str:
    """Return nats for each label of a classification set, differences and shares of the gap."""
    rows = []
    for task in dict.fromkeys(cell.task for cell in cells):
        tested = [cell for cell in cells if cell.task == task]
        lora, random = of_method(tested, LORA), of_method(tested, RANDOM)
        for method in dict.fromkeys(cell.method for cell in tested):
            own = of_method(tested, method)
            rows.append(
                [
                    task,
                    method,
                    *compared(own, lora, random),
                    _to_halfway(own, lora, random),
                    f"{own[0].rate:g}",
                ]
            )
    header = ["set", "method", "nats", "seeds", "to LoRA", "to random A, frozen"]
    return record.table([*header, "share of the gap", "to halfway", "rate"], rows)


def differences(cells: Sequence[Cell], tasks: Sequence[str]) -> str:
    """Return the differences chosen beforehand, a column for each kind of text, and their mean."""
    rows = []
    for first, second in CHOSEN:
        row = [f"{first} - {second}"]
        for task in tasks:
            some = [cell for cell in cells if cell.task == task]
            row.append(difference(of_method(some, first), of_method(some, second)))
        if any(cell != "-" for cell in row[1:]):
            rows.append([*row, _over_tasks(cells, tasks, first, second)])
    return record.table(["difference of", *tasks, "mean of all kinds"], rows)


def _over_tasks(cells: Sequence[Cell], tasks: Sequence[str], first: str, second: str) -> str:
    """Return the mean difference over tasks, "-" unless both methods were run on all."""
    by_task = [[cell for cell in cells if cell.task == task] for task in tasks]
    groups = [(of_method(some, first), of_method(some, second)) for some in by_task]
    if len(tasks) < 2 or any(difference(*group) == "-" for group in groups):
        return "-"
    return _shown(pooled(groups, nats))


def resolved(cells: Sequence[Cell], tasks: Sequence[str]) -> str:
    """Return the differences to LoRA and random A that exceed `LEAST` nats beyond their interval.

    "no" is a difference that does not, "-" one that was not run.
    """
    rows = []
    for other in (LORA, RANDOM):
        for method in [name for name in LIKELIHOOD if (name, other) != (LORA, RANDOM)]:
            row = [f"{method} - {other}"]
            for task in tasks:
                some = [cell for cell in cells if cell.task == task]
                row.append(_if_resolved(of_method(some, method), of_method(some, other)))
            if set(row[1:]) - {"-", "no"}:
                rows.append(row)
    return record.table(["difference of", *tasks], rows)


def _if_resolved(own: Sequence[Cell], others: Sequence[Cell]) -> str:
    shown = difference(own, others)
    if shown == "-":
        return shown
    found = paired(own, others, nats)
    return shown.strip("*") if abs(found.mean) - found.half > LEAST else "no"


def validation(cells: Sequence[Cell]) -> str:
    """Return nats on validation texts at the best rate that was tried, by kind."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    rows = []
    for method in LIKELIHOOD:
        row = [method]
        for task in tasks:
            own = [cell for cell in cells if cell.method == method and cell.task == task]
            best = min(own, key=validated, default=None)
            rates = f" of {len(own)}" if len(own) > 1 else ""
            row.append(f"{validated(best):.3f} at {best.rate:g}{rates}" if best else "-")
        if any(cell != "-" for cell in row[1:]):
            rows.append(row)
    return record.table(["method", *tasks], rows)


def nats(cell: Cell) -> float:
    """Return the test figure of the kind of text that was trained on."""
    if cell.test is None:
        raise ValueError(f"expected a tested cell, got one of tuning: {cell.key}")
    return cell.test[_kind(cell)]


def forgotten(cell: Cell) -> float:
    """Return the test figure of the other kind of text."""
    if cell.test is None:
        raise ValueError(f"expected a tested cell, got one of tuning: {cell.key}")
    return next(value for name, value in cell.test.items() if name != _kind(cell))


def validated(cell: Cell) -> float:
    """Return the validation figure."""
    return cell.validation[_kind(cell)]


def difference(own: Sequence[Cell], others: Sequence[Cell]) -> str:
    """Return a paired difference with its interval, bold if it excludes zero."""
    if own == others or len({c.seed for c in own} & {c.seed for c in others}) < 2:
        return "-"
    return _shown(paired(own, others, nats))


def _shown(found: Difference) -> str:
    shown = f"{found.mean:+.3f} ± {found.half:.3f}"
    return f"**{shown}**" if found.clear else shown


def share_of_gap(own: Sequence[Cell], lora: Sequence[Cell], random: Sequence[Cell]) -> str:
    """Return how much of the way from random A to LoRA a method goes, over common seeds.

    "-" where LoRA is not shown to be better than random A: there is no way to go.
    """
    at = [{cell.seed: nats(cell) for cell in some} for some in (own, lora, random)]
    common = at[0].keys() & at[1].keys() & at[2].keys()
    if len(common) < 2 or own in (lora, random) or not paired(lora, random, nats).clear:
        return "-"
    here, there, start = (mean(some[seed] for seed in common) for some in at)
    return f"{100 * (start - here) / (start - there):.0f} %"


def _to_halfway(own: Sequence[Cell], lora: Sequence[Cell], random: Sequence[Cell]) -> str:
    """Return the difference to the middle between random A and LoRA, paired by seed."""
    start = {cell.seed: nats(cell) for cell in random}
    halfway = [
        replace(cell, test={_kind(cell): (nats(cell) + start[cell.seed]) / 2})
        for cell in lora
        if cell.seed in start
    ]
    return "-" if own in (lora, random) else difference(own, halfway)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation; a single value has the former only."""
    center, deviation = mean_and_deviation(values)
    return f"{center:.3f} ± {deviation:.3f}" if len(values) > 1 else f"{center:.3f}"


def _kind(cell: Cell) -> str:
    return cell.task.split(", ")[0]


def _settings(cell: Cell) -> tuple[int, int, int]:
    return cell.rank, cell.steps, cell.learn_from
