"""StreamingPCA and fit_projector beside scikit-learn, on dense rows and on TF-IDF.

    python -m benchmarks.peers_sklearn [--quick]

Dense: `StreamingPCA` in the place of `IncrementalPCA`, 20,000 x 4,096 float32 whose energies fall
like 1 / k, 64 components, `batch_size=1024`. Sparse: `fit_projector` beside `TruncatedSVD`
(randomized, and ARPACK as the optimum), rank 50, the TF-IDF matrix of 10,043 movie reviews. One
thread, each fit in a fresh process, alternating. Time is that of the processor, as other work may
be on the machine; memory is the peak above the rows; error is the excess over the optimum.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy.sparse.linalg import svds
from sklearn.decomposition import IncrementalPCA, TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits

from benchmarks import record
from benchmarks.assets import movie_reviews
from benchmarks.learners import decaying
from benchmarks.memory import peak_bytes
from ipa_core import ExactCovariance, fit_projector
from ipa_sklearn import StreamingPCA

PACKAGES = ["ipa-projectors", "numpy", "scikit-learn", "scipy"]
DENSE, SPARSE = 64, 50
Fit = Callable[[Any], np.ndarray]


def partial_fits(estimator: Any, x: np.ndarray) -> np.ndarray:
    """Return the components learned by a loop over batches of 1,024 rows."""
    for start in range(0, len(x), 1024):
        estimator.partial_fit(x[start : start + 1024])
    return estimator.components_


FITS: dict[str, dict[str, Fit]] = {
    "dense": {
        "StreamingPCA": lambda x: StreamingPCA(DENSE, batch_size=1024).fit(x).components_,
        "StreamingPCA, partial_fit": lambda x: partial_fits(StreamingPCA(DENSE), x),
        "IncrementalPCA": lambda x: IncrementalPCA(DENSE, batch_size=1024).fit(x).components_,
    },
    "sparse": {
        "fit_projector": lambda x: fit_projector(x, SPARSE).components,
        "TruncatedSVD": lambda x: TruncatedSVD(SPARSE, random_state=0).fit(x).components_,
    },
}


def rows_of(kind: str, quick: bool) -> Any:
    """Return the rows, dense or sparse."""
    if kind == "sparse":
        texts = [text for text, _ in movie_reviews()]
        return TfidfVectorizer(dtype=np.float32).fit_transform(texts)
    features, rows = (512, 4_000) if quick else (4_096, 20_000)
    x = np.empty((rows, features), dtype="float32")
    count = rows // 1_000
    for number, batch in enumerate(decaying(features, 1_000, count)):
        x[1_000 * number : 1_000 * (number + 1)] = batch
    return x


def excess(kind: str, x: Any, components: list[np.ndarray]) -> list[float]:
    """Return the errors of the components over the optimum of the rows, minus 1."""
    bases = [np.linalg.qr(rows.astype(np.float64).T)[0] for rows in components]
    if kind == "sparse":
        total = float(x.multiply(x).sum(dtype=np.float64))
        best = total - float((svds(x.astype(np.float64), k=SPARSE)[1] ** 2).sum())
        return [(total - float(((x @ basis) ** 2).sum())) / best - 1 for basis in bases]
    oracle = ExactCovariance(DENSE, center=True)
    for start in range(0, len(x), 1_000):
        oracle.update(x[start : start + 1_000].astype(np.float64))
    best = oracle.finalize()
    learned = [replace(best, components=basis.T) for basis in bases]
    return [oracle.residual(one) / oracle.residual(best) - 1 for one in learned]


def measure(kind: str, name: str, quick: bool, file: str) -> None:
    """Fit once; save the components; print processor seconds and peak bytes."""
    fit = FITS[kind][name]
    x = rows_of(kind, quick)
    fit(x[:1_100])  # imports and buffers
    learned: list[np.ndarray] = []
    seconds: list[float] = []

    def timed() -> None:  # without the garbage collection before memory is measured
        start = time.process_time()
        learned.append(fit(x))
        seconds.append(time.process_time() - start)

    with threadpool_limits(1):
        peak = peak_bytes(timed)
    np.save(file, learned[0])
    print(json.dumps({"seconds": seconds[0], "peak_bytes": peak}))


def compare(kind: str, quick: bool, repeats: int) -> dict[str, dict[str, float]]:
    """Return medians of times and memory, ratios of times to the first, and errors."""
    names = list(FITS[kind])
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with TemporaryDirectory() as folder:
        files = [f"{folder}/{number}.npy" for number in range(len(names))]
        for _ in range(repeats):
            for name, file in zip(names, files, strict=True):
                runs[name].append(_in_a_process(kind, name, quick, file))
                print(kind, name, runs[name][-1], flush=True)
        errors = excess(kind, rows_of(kind, quick), [np.load(file) for file in files])
    first = [run["seconds"] for run in runs[names[0]]]
    return {
        name: {
            "seconds_median": statistics.median(run["seconds"] for run in runs[name]),
            "time_ratio": statistics.median(
                run["seconds"] / one for run, one in zip(runs[name], first, strict=True)
            ),
            "peak_mb": statistics.median(run["peak_bytes"] for run in runs[name]) / 1e6,
            "excess": error,
        }
        for name, error in zip(names, errors, strict=True)
    }


def _in_a_process(kind: str, name: str, quick: bool, file: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.peers_sklearn", "--measure", kind, name, file]
    command += ["--quick"] if quick else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller, once")
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "NAME", "FILE"))
    arguments = parser.parse_args()
    if arguments.measure:
        kind, name, file = arguments.measure
        return measure(kind, name, arguments.quick, file)
    results = {kind: compare(kind, arguments.quick, 1 if arguments.quick else 3) for kind in FITS}
    lines = [
        [name, f"{f['time_ratio']:.1f}", f"{f['peak_mb']:.0f}", f"{f['excess']:.0e}"]
        for figures in results.values()
        for name, f in figures.items()
    ]
    text = record.table(["fit", "time, ours = 1", "peak MB", "excess error"], lines)
    print(text)
    rows, features = rows_of("sparse", arguments.quick).shape
    sizes = {"threads": 1, "sparse_as_dense_mb": rows * features * 4 / 1e6}
    path = record.write("peers_sklearn", arguments.quick, PACKAGES, sizes | results)
    path.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
