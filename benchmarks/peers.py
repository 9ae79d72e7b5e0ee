"""Time of a batch and excess error: the default learner beside its peers.

    python -m benchmarks.peers [--quick]

2,048 rows of 4,096 features, energies like 1 / k, rank 32, float32, one thread. Peers are timed on
their second batch, which they merge with the first; ours on the mean of twelve later ones and the
projector at their end; `torch.pca_lowrank`, which is no stream, on all four batches in memory, a
quarter of its time. Errors are over four batches, as excess over the float64 optimum about the
origin (the data's mean is zero). The floor is the two products of our sketch's width.
"""

import argparse
import statistics
from typing import Any

import numpy as np
import torch
from peft.utils.incremental_pca import IncrementalPCA as PeftIncrementalPCA
from sklearn.decomposition import IncrementalPCA as SklearnIncrementalPCA
from threadpoolctl import threadpool_limits

from benchmarks import floor, record
from benchmarks.learners import decaying, learn
from benchmarks.timing import seconds
from ipa_core import ExactCovariance, IncrementalPCA, Projector, RandomizedSVD

OWN = {"RandomizedSVD": RandomizedSVD, "IncrementalPCA": IncrementalPCA}
LOWRANK = "torch.pca_lowrank, all rows in memory"
PACKAGES = ["ipa-projectors", "numpy", "peft", "scikit-learn", "torch"]


def others(rank: int, pool: list[np.ndarray]) -> dict[str, tuple[Any, list[Any]]]:
    """Return the peers, ready to learn, and the batches as they want them."""
    tensors = [torch.from_numpy(batch) for batch in pool]
    quick = PeftIncrementalPCA(rank, lowrank=True, lowrank_seed=0)
    return {
        "scikit-learn IncrementalPCA": (SklearnIncrementalPCA(rank), pool),
        "PEFT IncrementalPCA": (PeftIncrementalPCA(rank), tensors),
        "PEFT IncrementalPCA, lowrank": (quick, tensors),
    }


def lowrank(pool: list[np.ndarray], rank: int) -> np.ndarray:
    """Return the directions that torch finds with its default two power iterations."""
    _, _, v = torch.pca_lowrank(torch.from_numpy(np.concatenate(pool)), q=2 * rank, center=False)
    return v[:, :rank].T.numpy()


def own_seconds(make: type[RandomizedSVD] | type[IncrementalPCA], rank: int, pool: Any) -> float:
    learner = make(rank)
    learn(learner, pool, len(pool))
    count = 3 * len(pool)
    return seconds(lambda: learn(learner, pool, count)) / count


def compare(features: int, rows: int, rank: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return the time ratios to the default learner and the excess errors."""
    pool = decaying(features, rows, 4)
    times: dict[str, list[float]] = {}
    learned: dict[str, Any] = {}
    for _ in range(repeats):
        for name, make in OWN.items():
            times.setdefault(name, []).append(own_seconds(make, rank, pool))
        for name, (peer, batches) in others(rank, pool).items():
            peer.partial_fit(batches[0])
            second = seconds(lambda peer=peer, batch=batches[1]: peer.partial_fit(batch))
            times.setdefault(name, []).append(second)
            learned[name] = peer, batches[2:]
        times.setdefault(LOWRANK, []).append(seconds(lambda: lowrank(pool, rank)) / len(pool))
        print({name: f"{values[-1]:.2f} s" for name, values in times.items()}, flush=True)
    errors = excess_errors(pool, rank, learned)
    own = times["RandomizedSVD"]
    return {
        name: {
            "seconds_median": statistics.median(values),
            "time_ratio": statistics.median(t / o for t, o in zip(values, own, strict=True)),
            "excess": errors[name],
        }
        for name, values in times.items()
    }


def excess_errors(pool: list[np.ndarray], rank: int, learned: dict[str, Any]) -> dict[str, float]:
    oracle = ExactCovariance(rank)
    for batch in pool:
        oracle.update(batch.astype(np.float64))
    best = oracle.residual(oracle.finalize())
    rows = {LOWRANK: lowrank(pool, rank)}
    for name, make in OWN.items():
        learner = make(rank)
        for batch in pool:
            learner.update(batch)
        rows[name] = np.asarray(learner.finalize().components)
    for name, (peer, rest) in learned.items():
        for batch in rest:
            peer.partial_fit(batch)
        rows[name] = np.asarray(peer.components_)
    zeros = np.zeros(pool[0].shape[1])
    errors = {}
    for name, components in rows.items():
        basis = np.linalg.qr(components.astype(np.float64).T)[0].T
        projector = Projector(basis, zeros, np.zeros(rank), 1.0, 1)
        errors[name] = oracle.residual(projector) / best - 1
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller, once")
    quick = parser.parse_args().quick
    features, rows, rank, repeats = (1024, 1024, 16, 1) if quick else (4096, 2048, 32, 3)
    torch.set_num_threads(1)
    machine = floor.machine()
    with threadpool_limits(1):
        figures = compare(features, rows, rank, repeats)
    entries = rows * features
    least = machine.seconds(floor.two_products(rank, entries), 4 * entries)
    own = figures["RandomizedSVD"]["seconds_median"]
    lines = [["floor", f"{least / own:.2f}", "-"]]
    lines += [[name, f"{f['time_ratio']:.1f}", f"{f['excess']:.0e}"] for name, f in figures.items()]
    text = record.table(["learner", "time, ours = 1", "excess error"], lines)
    print(text)
    results = {
        "threads": 1,
        "machine_floor": machine.record(),
        "floors": {name: f["seconds_median"] / least for name, f in figures.items()},
        "peers": figures,
    }
    path = record.write("peers", quick, PACKAGES, results)
    path.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
