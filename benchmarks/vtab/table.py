"""Table of all cells: python -m benchmarks.vtab.table [RESULTS]."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.record import table
from benchmarks.vtab.sets import GROUPS

RESULTS = Path(__file__).parents[1] / "results" / "vtab"
_KNOWN = {name: group for group, names in GROUPS.items() for name in names}

Cells = dict[str, dict[str, dict[str, Any]]]


def slug(method: str) -> str:
    """Return the name of a method's file."""
    return method.lower().replace(", ", "-").replace(" ", "-")


def write(results: Path) -> Path:
    """Write the tables of all backbones that have results."""
    parts = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        cells = _cells(folder)
        if cells:
            parts.append(f"### {folder.name}\n\n{_described(cells)}\n\n{_table(cells)}\n")
    path = results.with_suffix(".md")
    path.write_text("\n".join(parts))
    return path


def _cells(folder: Path) -> Cells:
    """Return results by method and set."""
    cells: Cells = defaultdict(dict)
    for path in sorted(folder.glob("*/*.json")):
        cell = json.loads(path.read_text())
        cells[cell["method"]][cell["set"]] = cell
    return dict(cells)


def _described(cells: Cells) -> str:
    one = next(iter(next(iter(cells.values())).values()))
    settings = one["settings"]
    done = {name for row in cells.values() for name in row}
    absent = [name for name in _KNOWN if name not in done]
    return (
        f"Test accuracy in per cent, mean ± standard deviation over {len(one['runs'])} seeds. "
        f"Rank {one['rank']}, {one['layers']} layers from block {one['first_block']} on, images of "
        f"{one['pixels']} pixels, {one['head']} head, {settings['epochs']} epochs in batches of "
        f"{settings['batch_size']}. Learning rate out of {settings['rates']} by seed "
        f"{settings['seeds'][0]}, and epoch, chosen on the 200 validation images. The last column "
        "is the mean difference seed by seed over the sets that both methods have. "
        f"Absent of the 19: {', '.join(absent) or 'none'}."
    )


def _table(cells: Cells) -> str:
    order = [*_KNOWN, *sorted({n for row in cells.values() for n in row} - set(_KNOWN))]
    names = [name for name in order if any(name in row for row in cells.values())]
    groups = [g for g in GROUPS if any(_KNOWN.get(name) == g for name in names)]
    methods = sorted(cells, key=_place)
    rows = []
    for method in methods:
        row = cells[method]
        means = {name: mean(_tests(row[name])) for name in names if name in row}
        rows.append(
            [
                method,
                f"{next(iter(row.values()))['trainable']:,}",
                *(_shown(row[name]) if name in row else "-" for name in names),
                *(_mean([means.get(n) for n in names if _KNOWN.get(n) == g]) for g in groups),
                _mean([_group_mean(means, names, g) for g in groups])
                if groups
                else _mean([means.get(name) for name in names]),
                _against(row, cells.get("LoRA", {})),
            ]
        )
    average = "mean of groups" if groups else "mean"
    shares = [
        f"{g} ({sum(_KNOWN.get(name) == g for name in names)} of {len(GROUPS[g])})" for g in groups
    ]
    header = ["method", "trainable", *names, *shares, average, "against LoRA"]
    return table(header, rows)


def _place(method: str) -> int:
    from benchmarks.vtab.methods import METHODS

    return list(METHODS).index(method)


def _group_mean(means: dict[str, float], names: list[str], group: str) -> float | None:
    own = [means.get(name) for name in names if _KNOWN.get(name) == group]
    return None if None in own else mean(value for value in own if value is not None)


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * mean(known):.1f}" if known and len(known) == len(values) else "-"


def _against(row: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> str:
    """Return the mean difference to another method, seed by seed, over the sets that both have."""
    differences = [
        100 * (a - b)
        for name in row.keys() & other.keys()
        for a, b in zip(_tests(row[name]), _tests(other[name]), strict=False)
    ]
    if row is other or not differences:
        return "-"
    spread = f" ± {stdev(differences):.1f}" if len(differences) > 1 else ""
    return f"{mean(differences):+.1f}{spread}"


def _tests(cell: dict[str, Any]) -> list[float]:
    return [run["test"] for run in cell["runs"]]


def _shown(cell: dict[str, Any]) -> str:
    tests = [100 * test for test in _tests(cell)]
    spread = f" ± {stdev(tests):.1f}" if len(tests) > 1 else ""
    return f"{mean(tests):.1f}{spread} ({cell['runs'][0]['rate']:g})"


if __name__ == "__main__":
    print(write(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS).read_text())
