"""Table of the results of the GPU study: python -m benchmarks.gpu_table."""

import json
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from scipy import stats

from benchmarks.evidence.cells import FOLDER
from benchmarks.record import path_of, table

OTHERS = ("LoRA", "random A, frozen")


def text(study: Mapping[str, Any]) -> str:
    """Return the nats of each method on test texts, and differences paired by seed."""
    methods, (_, other_kind) = study["methods"], study["kinds"]
    header = ["method", "rate", "nats for a token", *(f"minus {name}" for name in OTHERS)]
    rows = [
        [
            name,
            f"{found['rate']:g}{' (edge)' if found['edge'] else ''}",
            f"{found['mean']:.3f}",
            *(_difference(found["nats"], methods[other]["nats"]) for other in OTHERS),
            f"{mean(found['other']):.3f}",
        ]
        for name, found in sorted(methods.items(), key=lambda item: float(item[1]["mean"]))
    ]
    return table([*header, other_kind], rows) + "\n"


def _difference(nats: Sequence[float], others: Sequence[float]) -> str:
    """Return the mean of paired differences with its 95 % confidence interval, Student's."""
    differences = [a - b for a, b in zip(nats, others, strict=True)]
    if not any(differences):
        return ""
    width = stats.t.ppf(0.975, len(nats) - 1) * stdev(differences) / len(nats) ** 0.5
    return f"{mean(differences):+.3f} ± {width:.3f}"


def main() -> int:
    study = json.loads(path_of("gpu", quick=False).read_text("utf-8"))["study"]
    (FOLDER / "likelihood_gpu.md").write_text(text(study), "utf-8")
    print(text(study))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
