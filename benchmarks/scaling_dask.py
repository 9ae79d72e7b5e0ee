"""Activations on disk that outgrow memory, learned by two Dask workers of one thread each.

    python -m benchmarks.scaling_dask [--quick] [--folder FOLDER]

8 GB of 4,096 features: eigenvalues k^-1, mixed by three Householder reflections. Measured beside
learning, by the same workers over the same files, which are put out of the page cache each time:
a plain sequential read, and the two bare products that a sketch cannot do without, on rows that are
in memory already. All three take turns; their medians are compared. Beside the time that passes
stands that of processors, all workers together, which other work on the machine changes less. The
excess is that over the optimum of the distribution, which is known.
"""

import argparse
import operator
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from ipa_core import Projector, RandomizedSVD, dask_backend

FEATURES, SHARD_ROWS = 4096, 16_384
PACKAGES = ["dask", "distributed", "ipa-projectors", "numpy"]


def reflections() -> np.ndarray:
    v = np.random.default_rng(7).standard_normal((3, FEATURES)).astype("float32")
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def mixed(rows: np.ndarray) -> np.ndarray:
    for v in reflections():
        rows -= 2 * np.outer(rows @ v, v)
    return rows


def generate(path: Path, seed: int) -> None:
    scale = np.arange(1, FEATURES + 1, dtype="float32") ** -0.5
    rng = np.random.default_rng(seed)
    file = np.lib.format.open_memmap(path, "w+", "float32", (SHARD_ROWS, FEATURES))
    for start in range(0, SHARD_ROWS, 1024):
        rows = rng.standard_normal((1024, FEATURES), dtype="float32") * scale
        file[start : start + 1024] = mixed(rows)
    file.flush()


def excess(projector: Projector) -> float:
    """The distribution's, of which the spectrum is known."""
    back = projector.components.astype(float)
    for v in reflections()[::-1].astype(float):
        back = back - 2 * np.outer(back @ v, v)
    values = 1 / np.arange(1, FEATURES + 1)
    left = values.sum() - float((back**2 @ values).sum())
    return left / values[projector.rank :].sum() - 1


def evict(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> int:
    buffer, total = bytearray(16 << 20), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def products(path: Path, width: int) -> None:
    """Both products for as many rows as a file has; the rows are made once in a worker."""
    x, basis = _in_memory(width)
    image = np.zeros((width, FEATURES), dtype="float32")
    for _ in range(SHARD_ROWS // len(x)):
        image += (x @ basis).T @ x


_made: dict[int, Any] = {}


def _in_memory(width: int) -> Any:
    if width not in _made:
        rng = np.random.default_rng(0)
        _made[width] = (
            rng.standard_normal((8192, FEATURES), dtype="float32"),
            np.linalg.qr(rng.standard_normal((FEATURES, width)))[0].astype("float32"),
        )
    return _made[width]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock:
    """Seconds that pass, and those that processors spend on workers' work, all workers together."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __enter__(self) -> "Clock":
        self._began = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.passed, self.spent = map(operator.sub, self._now(), self._began)

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), sum(self._client.run(time.process_time).values())


def on_workers(paths: list[Path], work: Callable[[Path], Any]) -> Clock:
    """Return what fresh workers take for all files."""
    with cluster() as client:
        client.run(work, paths[0])  # imports and first pages are not counted
        evict(paths)
        with Clock(client) as clock:
            client.gather(client.map(work, paths, pure=False))
        return clock


class cluster:
    """Two workers of one thread and 2 GB each."""

    def __enter__(self) -> Any:
        from distributed import Client, LocalCluster

        self._cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit="2GB", dashboard_address=":0"
        )
        self._client = Client(self._cluster)
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._cluster.close()


def learn(paths: list[Path], rank: int) -> tuple[Clock, dict[str, Any]]:
    with cluster() as client:
        client.run(partial(_warm, rank))
        idle = client.run(peak)
        evict(paths)
        with Clock(client) as clock:
            projector = dask_backend.fit_projector(paths, rank)
        peaks = client.run(peak)
    return clock, {
        "peak_bytes_a_worker": max(peaks.values()),
        "of_which_before_learning": max(idle.values()),
        "excess": float(excess(projector)),
        "samples": projector.samples,
    }


def _warm(rank: int) -> None:
    RandomizedSVD(rank).update(np.ones((4, 2 * rank), dtype="float32"))


def data(folder: Path, count: int) -> list[Path]:
    """Return the files of a folder; those that are not there are made, two at a time."""
    paths = [folder / f"{number:03d}.npy" for number in range(count)]
    absent = [number for number, path in enumerate(paths) if not path.exists()]
    with cluster() as client:
        client.gather(client.map(generate, [paths[number] for number in absent], absent))
    return paths


def measure(paths: list[Path], rank: int, rounds: int) -> dict[str, Any]:
    """Read, multiply and learn, interleaved; the ratio is that of medians."""
    bare = partial(products, width=rank + RandomizedSVD(rank).oversample)
    clocks: dict[str, list[Clock]] = {"read": [], "two_products": [], "learning": []}
    for _ in range(rounds):
        clocks["read"].append(on_workers(paths, read))
        clocks["two_products"].append(on_workers(paths, bare))
        clock, found = learn(paths, rank)
        clocks["learning"].append(clock)
    medians = {name: statistics.median(c.passed for c in each) for name, each in clocks.items()}
    run = {"rank": rank, "bytes": sum(path.stat().st_size for path in paths)} | found
    for name, each in clocks.items():
        run[f"{name}_s"] = medians[name]
        run[f"{name}_s_each"] = [clock.passed for clock in each]
        run[f"{name}_processor_s"] = statistics.median(clock.spent for clock in each)
    larger = max(medians["read"], medians["two_products"])
    return run | {"ratio_to_the_larger": medians["learning"] / larger}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 GB")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the data stay for another run")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(prefix="ipa-scaling-") as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        paths = data(folder, 4 if args.quick else 30)
        for rank in args.ranks:
            runs.append(measure(paths, rank, args.rounds))
            print(runs[-1], flush=True)
    record.write("scaling_dask", args.quick, PACKAGES, {"workers": 2, "runs": runs})


if __name__ == "__main__":
    # Functions of a module that can be imported are sent by name: workers keep its globals.
    from benchmarks import scaling_dask

    scaling_dask.main()
