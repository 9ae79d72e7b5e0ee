"""The tables of the documentation, from the cells: python -m benchmarks.evidence.tables."""

from collections.abc import Iterable, Sequence

from benchmarks import record
from benchmarks.evidence import claims, likelihood_curves, likelihood_tables, vision
from benchmarks.evidence.cells import FOLDER, Cell, read
from benchmarks.evidence.methods import BEYOND, COMPARED, LEARNED, METHODS
from benchmarks.evidence.statistics import mean_and_deviation, of_method, paired

#: What differences are taken to.
LORA, RANDOM = "LoRA", "random A, frozen"
HEADER = [
    "method",
    "trainable",
    "accuracy",
    "seeds",
    "to LoRA",
    "to random A, frozen",
    "rate",
    "steps for P",
    "MiB",
    "s",
]


def main() -> None:
    every: list[Cell] = []
    for path in sorted(FOLDER.glob("*.jsonl")):
        cells = list(read(path))
        every += cells
        for name, text in tables(cells).items():
            _write(f"{path.stem}_{name}", text)
    for name, text in likelihood_tables.tables(every).items():
        _write(f"likelihood_{name}", text)
    _write("likelihood_curves", likelihood_curves.table(every))
    every += vision.read()
    _write("claims", claims.table(claims.CLAIMS, every))
    _write("own", claims.table(claims.OWN, every))
    _write("fresh", claims.fresh(every))
    _write("chosen", claims.chosen(every))
    if any(cell.study == "share" for cell in every):
        _write("shares", claims.shares(every))


def _write(name: str, text: str) -> None:
    path = FOLDER / f"{name}.md"
    path.write_text(text + "\n", encoding="utf-8")
    print(f"written to {path}")


def tables(cells: Sequence[Cell]) -> dict[str, str]:
    """Return the tables of some cells, by a name for the file."""
    made = {}
    for task in dict.fromkeys(cell.task for cell in cells):
        own = [cell for cell in cells if cell.task == task]
        slug = task.replace(" ", "_").replace("-", "_").lower()
        main_cells = [cell for cell in own if cell.study == "main"]
        if main_cells:
            made[slug] = comparison(main_cells, COMPARED)
            for group, methods in {"beyond": BEYOND, "learned": LEARNED}.items():
                if any(of_method(main_cells, name) for name in methods):
                    made[f"{slug}_{group}"] = comparison(main_cells, methods)
            sets = {name for cell in main_cells for name in cell.validation}
            if len(sets) > 1:
                made[f"{slug}_sets"] = by_set(main_cells)
        for study, varied in (("rank", "rank"), ("share", "learn_from")):
            swept = [cell for cell in own if cell.study == study]
            if swept:
                made[f"{slug}_{study}"] = sweep(swept, varied)
    return made


def comparison(cells: Sequence[Cell], methods: Iterable[str]) -> str:
    """Return accuracy, differences and costs of those methods that have been tested."""
    lora, random = of_method(cells, LORA), of_method(cells, RANDOM)
    rows = []
    for method in _methods(cells, methods):
        own = of_method(cells, method)
        rows.append(
            [
                method,
                f"{own[0].trainable:,}",
                _spread([cell.accuracy for cell in own]),
                str(len(own)),
                _difference(own, lora),
                _difference(own, random),
                f"{own[0].rate:g}",
                f"{mean_and_deviation([cell.steps_of_p for cell in own])[0]:.0f}",
                f"{own[0].mebibytes:.0f}",
                f"{min(cell.seconds for cell in own):.0f}",
            ]
        )
    return record.table(HEADER, rows)


def by_set(cells: Sequence[Cell]) -> str:
    """Return the accuracy on each set and their average."""
    sets = list(cells[0].validation)
    rows = []
    for method in _methods(cells):
        own = of_method(cells, method)
        found = [[100 * cell.test[name] for cell in own if cell.test] for name in sets]
        values = [*found, [cell.accuracy for cell in own]]
        rows.append([method, *map(_spread, values)])
    return record.table(["method", *sets, "average"], rows)


def sweep(cells: Sequence[Cell], varied: str) -> str:
    """Return accuracy against what was varied, a row for each method."""
    steps = sorted({getattr(cell, varied) for cell in cells})
    rows = []
    for method in _methods(cells):
        row = [method]
        for step in steps:
            own = of_method([cell for cell in cells if getattr(cell, varied) == step], method)
            row.append(_spread([cell.accuracy for cell in own]) if own else "-")
        rows.append(row)
    return record.table([varied.replace("learn_from", "texts for P"), *map(str, steps)], rows)


def _spread(values: Sequence[float]) -> str:
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.1f} ± {deviation:.1f}" if len(values) > 1 else f"{mean:.1f}"


def _methods(cells: Sequence[Cell], methods: Iterable[str] = METHODS) -> list[str]:
    """Return the methods that have been tested, in their order."""
    return [method for method in methods if of_method(cells, method)]


def _difference(own: Sequence[Cell], others: Sequence[Cell]) -> str:
    if len({cell.seed for cell in own} & {cell.seed for cell in others}) < 2 or own == others:
        return "-"
    difference = paired(own, others)
    return f"**{difference}**" if difference.clear else str(difference)


if __name__ == "__main__":
    main()
