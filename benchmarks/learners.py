"""Learners against each other and against their floor.

python -m benchmarks.learners [--quick]

Error: excess over the float64 optimum on real and hard streams, rank 16, one pass.
Time: per row, as a ratio to the two bare matrix products of the default learner's sketch.
"""

import argparse
import statistics
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks import floor, record
from benchmarks.activations import streams
from benchmarks.timing import seconds
from ipa_core import (
    ExactCovariance,
    HebbianRule,
    IncrementalPCA,
    Learner,
    RandomizedSVD,
    ReconstructionAutoencoder,
    fit_projector,
)

RANK = 16
LEARNERS: dict[str, Callable[[int], Learner]] = {
    "ExactCovariance": ExactCovariance,
    "RandomizedSVD": RandomizedSVD,
    "IncrementalPCA": IncrementalPCA,
    "ReconstructionAutoencoder": ReconstructionAutoencoder,
    "ReconstructionAutoencoder, 5 epochs": partial(ReconstructionAutoencoder, epochs=5),
    "HebbianRule": HebbianRule,
}


def excess_errors(batches: int) -> dict[str, dict[str, float]]:
    """Return the excess error of each learner on each stream."""
    table: dict[str, dict[str, float]] = {name: {} for name in LEARNERS}
    for stream_name, stream in streams(batches).items():
        oracle = ExactCovariance(RANK)
        for batch in stream:
            oracle.update(batch.astype(np.float64))
        best = oracle.residual(oracle.finalize())
        # Of data of exactly low rank nothing should be lost: judge by a millionth of all.
        scale = max(best, 1e-6 * oracle.finalize().total_energy)
        for name, learner in LEARNERS.items():
            loss = oracle.residual(fit_projector(stream, RANK, learner=learner)) - best
            table[name][stream_name] = loss / scale
            print(f"{stream_name:36} {name:36} {loss / scale:9.1e}", flush=True)
    return table


def decaying(features: int, rows: int, count: int) -> list[np.ndarray]:
    """Return batches whose energies fall like 1 / k, mixed by Householder reflections."""
    rng = np.random.default_rng(0)
    mirrors = rng.standard_normal((3, features), dtype="float32")
    mirrors /= np.linalg.norm(mirrors, axis=1, keepdims=True)
    spectrum = np.arange(1, features + 1, dtype="float32") ** -0.5
    batches = []
    for _ in range(count):
        x = rng.standard_normal((rows, features), dtype="float32") * spectrum
        for mirror in mirrors:
            x -= 2 * np.outer(x @ mirror, mirror)
        batches.append(x)
    return batches


def bare_products(pool: list[Any], count: int, width: int) -> None:
    """Do nothing but Y <- Y + X^T (X O), on ``count`` batches of NumPy or torch."""
    basis: Any = np.linalg.qr(np.ones((pool[0].shape[1], 1)) + np.eye(pool[0].shape[1], width))[0]
    basis, image = basis.astype("float32"), 0.0
    if isinstance(pool[0], torch.Tensor):
        basis = torch.from_numpy(basis)
    for number in range(count):
        x = pool[number % len(pool)]
        image = image + x.T @ (x @ basis)


def learn(learner: Learner, pool: list[Any], count: int) -> None:
    """Feed ``count`` batches to a learner."""
    for number in range(count):
        learner.update(pool[number % len(pool)])
    learner.finalize()


def cost(features: int, rows: int, total: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return time ratios to the floor and peak memory of each learner's state and work."""
    pool = decaying(features, rows, 4)
    names = [name for name in LEARNERS if "epochs" not in name]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float] = {}
    count = max(4, total // rows)
    # It would take minutes; its final decomposition then weighs more than on a long stream.
    short = max(4, count // 8)
    for _ in range(repeats):
        products = seconds(lambda: bare_products(pool, count, floor.width(RANK))) / count
        for name in names:
            batches = short if name == "ExactCovariance" else count
            learner = LEARNERS[name](RANK)
            taken = seconds(partial(learn, learner, pool, batches)) / batches
            ratios[name].append(taken / products)
    for name in names:
        tracemalloc.start()
        learn(LEARNERS[name](RANK), pool, 4)
        peaks[name] = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
    result = {
        name: {
            "time_ratio": statistics.median(ratios[name]),
            "peak_mib": peaks[name],
        }
        for name in names
    }
    for name, figures in result.items():
        print(
            f"{features} features, batches of {rows}: {name:28} {figures['time_ratio']:7.2f} x "
            f"floor, peak {figures['peak_mib']:7.1f} MiB",
            flush=True,
        )
    return result


def long_stream(
    features: int, rows: int, total: int, repeats: int, machine: floor.Machine
) -> dict[str, float]:
    """Return time ratios to the bare products over a long stream, its beginning included.

    Products are float32, in the learner's library. Among the ratios is that of the products'
    operations at the machine's speed.
    """
    pool, count = decaying(features, rows, 4), total // rows
    tensors = [torch.from_numpy(x) for x in pool]
    least = machine.seconds(floor.two_products(RANK, total * features), 4 * total * features)
    # IncrementalPCA's time for a row does not depend on how many came before.
    cases: dict[str, tuple[str, list[Any], int]] = {
        "RandomizedSVD": ("RandomizedSVD", pool, count),
        "IncrementalPCA": ("IncrementalPCA", pool, count // 8),
        "RandomizedSVD, torch": ("RandomizedSVD", tensors, count),
    }
    ratios: dict[str, list[float]] = {name: [] for name in (*cases, "floor")}
    for _ in range(repeats):
        for name, (learner, data, batches) in cases.items():
            products = seconds(partial(bare_products, data, count, floor.width(RANK)))
            taken = seconds(partial(learn, LEARNERS[learner](RANK), data, batches))
            ratios[name].append(taken / batches / (products / count))
            if name == "RandomizedSVD":
                ratios["floor"].append(least / products)
        print(f"{total:,} rows of {features}: {ratios}", flush=True)
    return {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    """Run all parts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = floor.machine()
    with threadpool_limits(args.threads):
        results: dict[str, Any] = {
            "threads": args.threads,
            "machine_floor": machine.record(),
            "excess": excess_errors(8 if args.quick else 40),
            "cost": {
                f"{features} features, batches of {rows}": cost(
                    features, rows, 8_192 if args.quick else 65_536, 1 if args.quick else 3
                )
                for features in ((384, 1536) if args.quick else (384, 1536, 4096))
                for rows in ((2048,) if args.quick else (300, 2048, 8192))
            },
            "long_stream": long_stream(
                *((1024, 1024, 65_536, 1) if args.quick else (4096, 2048, 262_144, 3)), machine
            ),
        }
    results["floors"] = {"long_stream": results["long_stream"].pop("floor")}
    packages = ["ipa-projectors", "numpy", "torch"]
    path = record.write("learners", args.quick, packages, results)
    path.with_suffix(".md").write_text(tables(results))


def tables(results: dict) -> str:
    """Return the tables of the guide."""
    names = list(LEARNERS)
    error = record.table(
        ["excess error", *names],
        [
            [stream, *(f"{results['excess'][name][stream]:.0e}" for name in names)]
            for stream in results["excess"][names[0]]
        ],
    )
    timed = [name for name in names if "epochs" not in name]
    cost_table = record.table(
        ["time over the floor / peak MiB", *timed],
        [
            [
                case,
                *(f"{row[name]['time_ratio']:.1f} / {row[name]['peak_mib']:.0f}" for name in timed),
            ]
            for case, row in results["cost"].items()
        ],
    )
    return f"{error}\n\n{cost_table}\n"


if __name__ == "__main__":
    main()
