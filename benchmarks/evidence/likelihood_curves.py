"""Nats per token over training steps and over ranks, on one kind of text."""

from collections.abc import Iterable, Sequence

from benchmarks import record
from benchmarks.evidence.cells import Cell
from benchmarks.evidence.likelihood_tables import (
    LORA,
    MAIN,
    RANDOM,
    compared,
    tested_cells,
)
from benchmarks.evidence.statistics import of_method

TASK = "headlines"
METHODS = (LORA, RANDOM, "IPA without first token, frozen")
#: Of the main comparison: rank and steps, one of which is varied, and the texts for P.
MAIN_RANK, MAIN_STEPS, LEARN_FROM = MAIN
HEADER = [
    "steps",
    "rank",
    "method",
    "trainable",
    "rate",
    "nats",
    "seeds",
    "to LoRA",
    "to random A, frozen",
    "share of the gap",
]


def curve_cells(cells: Iterable[Cell]) -> list[Cell]:
    """Return the tested cells of the curves: other steps at the main rank, or the reverse."""
    own = [cell for cell in cells if cell.task == TASK and cell.method in METHODS]
    varied = sorted(
        {
            (cell.rank, cell.steps)
            for cell in own
            if cell.rank == MAIN_RANK or cell.steps == MAIN_STEPS
        }
    )
    return [cell for rank, steps in varied for cell in tested_cells(own, (rank, steps, LEARN_FROM))]


def table(cells: Iterable[Cell]) -> str:
    """Return nats, differences and shares of the gap, rows in the order of steps and ranks."""
    tested = curve_cells(cells)
    rows = []
    for steps, rank in sorted({(cell.steps, cell.rank) for cell in tested}):
        rows += _rows([cell for cell in tested if (cell.steps, cell.rank) == (steps, rank)])
    return record.table(HEADER, rows)


def _rows(cells: Sequence[Cell]) -> list[list[str]]:
    """Return a row for each method, compared with LoRA and random A of the same settings."""
    lora, random = of_method(cells, LORA), of_method(cells, RANDOM)
    rows = []
    for method in METHODS:
        own = of_method(cells, method)
        if own:
            rows.append(
                [
                    str(own[0].steps),
                    str(own[0].rank),
                    method,
                    f"{own[0].trainable:,}",
                    f"{own[0].rate:g}",
                    *compared(own, lora, random),
                ]
            )
    return rows
