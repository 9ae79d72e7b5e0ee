"""Cost of the default learner beside other processes that keep the cores busy.

    python -m benchmarks.busy_machine [--quick]

2,048 x 1,024 float32 rows, rank 16, NumPy and torch on two threads, beside none and two busy
processes.
Updates alternate with the two products of the sketch's width. The ratio is of sums: what an update
waits for threads now and then counts.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks import floor, record
from benchmarks.learners import decaying
from ipa_core import RandomizedSVD

RANK, ROWS, FEATURES, THREADS = 16, 2048, 1024, 2
PACKAGES = ["ipa-projectors", "numpy", "threadpoolctl", "torch"]
# Products without an end, on one thread: a data loader at work.
BUSY = "import numpy as np\nx = np.ones((500, 500))\nwhile True: x = x @ x * 0"


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep cores busy."""
    environment = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", BUSY], env=environment) for _ in range(count)
    ]
    time.sleep(1.0 if count else 0.0)  # until they have started
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(batch: Any, basis: Any, repeats: int) -> dict[str, float]:
    """Return the seconds of updates and of two products, and their ratio."""
    learner = RandomizedSVD(RANK, half_products=False)
    for _ in range(20):  # into the long segments
        learner.update(batch)
    products = updates = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        (batch @ basis).T @ batch
        middle = time.perf_counter()
        learner.update(batch)
        products += middle - start
        updates += time.perf_counter() - middle
    return {
        "products_s": products / repeats,
        "update_s": updates / repeats,
        "ratio": updates / products,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer updates")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    batch = decaying(FEATURES, ROWS, 1)[0]
    basis = np.linalg.qr(np.ones((FEATURES, floor.width(RANK)), np.float32))[0]
    libraries = {
        "numpy": (batch, basis),
        "torch": (torch.from_numpy(batch), torch.from_numpy(basis)),
    }
    results: dict[str, Any] = {"threads": THREADS}
    with threadpool_limits(THREADS):
        for count in (0, 2):
            with busy_processes(count):
                for name, (x, o) in libraries.items():
                    found = measure(x, o, 20 if quick else 300)
                    results[f"{name}_beside_{count}"] = found
                    print(f"{name} beside {count} busy processes: {found['ratio']:.2f}", flush=True)
    record.write("busy_machine", quick, PACKAGES, results)


if __name__ == "__main__":
    main()
