"""Kill -9 at random moments: learning over a model, writing a store, a Dask worker.

    python -m benchmarks.scaling_kills [--quick]

Each killed run is started again until it completes; its result must then equal that of an
uninterrupted run bit by bit (on Dask up to rounding, with exact covariance). All files on disk are
read and checked after a kill. A repetition of more than five minutes ends the benchmark with the
stacks of all threads.
"""

import argparse
import faulthandler
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from ipa_core import ActivationStore, ExactCovariance, fit_projector
from ipa_torch import LayerProjectors
from tests.scale import fit_run, runs, store_run

AT_MOST = 300.0  # seconds for a kill and what follows from it
PACKAGES = ["dask", "distributed", "ipa-projectors", "torch"]


def chain(
    module: str,
    folder: Path,
    kills: int,
    span: float,
    begun: Callable[[], bool],
    look: Callable[[], Any],
) -> list[dict[str, Any]]:
    """Kill a run at random moments, as often as asked; then let it end."""
    rng, found = random.Random(module), []
    for _ in range(kills):
        faulthandler.dump_traceback_later(AT_MOST, exit=True)
        process = runs.start(module, folder)
        seconds = span * rng.random()
        runs.until(begun, process)
        time.sleep(seconds)
        over = process.poll() is not None
        runs.kill(process)
        found.append({"seconds": round(seconds, 3), "had_ended": over, "on_disk": look()})
        print(module, found[-1], flush=True)
    faulthandler.dump_traceback_later(AT_MOST, exit=True)
    process = runs.start(module, folder)
    _, errors = process.communicate()
    faulthandler.cancel_dump_traceback_later()
    if process.returncode:
        raise RuntimeError(errors)
    return found


def learning(kills: int, scratch: Path) -> list[dict[str, Any]]:
    folder, whole = scratch / "learning", scratch / "learning-whole"
    folder.mkdir()
    whole.mkdir()
    steps = folder / "checkpoints"
    found = chain(
        "fit_run",
        folder,
        kills,
        0.5,
        # At once after an import, with checkpoints of an earlier run there.
        lambda: any(steps.glob(".writing-*")) or (folder / "done.safetensors").exists(),
        lambda: max((path.name for path in steps.glob("step-*")), default="nothing yet"),
    )
    fit_run.main(whole, pause=0)
    ours, wanted = (LayerProjectors.load(f / "done.safetensors") for f in (folder, whole))
    assert runs.same(ours, wanted)
    return found


def storing(kills: int, scratch: Path) -> list[dict[str, Any]]:
    folder, whole = scratch / "store", scratch / "store-whole"

    def look() -> str:
        if not (folder / "index.json").exists():
            return "no index yet"
        store = ActivationStore(folder)
        assert store.damaged() == {}
        return f"{store.index.batches} batches, none damaged"

    before: set[str] = set()

    def begun() -> bool:
        now = {path.name for path in folder.glob("*")}
        new = bool(now - before)
        return new

    def seen() -> str:
        said = look()
        before.update(path.name for path in folder.glob("*"))
        return said

    found = chain("store_run", folder, kills, 0.12, begun, seen)
    store_run.main(whole, pause=0)
    one, other = ActivationStore(folder), ActivationStore(whole)
    for name in other:
        assert np.array_equal(np.concatenate([*one[name]]), np.concatenate([*other[name]]))
    return found


def workers(kills: int) -> list[dict[str, Any]]:
    import dask.array as da
    from distributed import Client, LocalCluster

    rng, found = random.Random("dask"), []
    x = np.random.default_rng(0).standard_normal((20_000, 32)) * np.arange(32, 0, -1)
    lazy = da.from_array(x, chunks=(500, 32)).map_blocks(_slowly, meta=x[:0])
    wanted = fit_projector(x, 4, learner=ExactCovariance)
    for _ in range(kills):
        faulthandler.dump_traceback_later(AT_MOST, exit=True)
        cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0")
        client = Client(cluster)
        pids = [*client.run(os.getpid).values()]
        results: list[Any] = []
        thread = threading.Thread(
            target=lambda results=results: results.append(
                fit_projector(lazy, 4, learner=ExactCovariance)
            )
        )
        start = time.perf_counter()
        thread.start()
        seconds = 2.0 * rng.random()
        time.sleep(seconds)
        over = not thread.is_alive()
        os.kill(rng.choice(pids), signal.SIGKILL)
        thread.join()
        whole = round(time.perf_counter() - start, 1)
        (ours,) = results
        inside = np.linalg.svd(ours.components @ wanted.components.T)[1].min()
        assert ours.samples == len(x) and 1 - inside < 1e-9
        found.append({"seconds": round(seconds, 3), "had_ended": over, "done_after": whole})
        print("dask", found[-1], flush=True)
        # A cluster that is closed too early waits without end for the replacement of the killed
        # worker, which looks for a scheduler that is gone.
        client.wait_for_workers(2, timeout=60)
        client.close()
        cluster.close(timeout=60)
    faulthandler.cancel_dump_traceback_later()
    return found


def _slowly(block: np.ndarray) -> np.ndarray:
    time.sleep(0.1)
    return block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 kills of each")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        results = {
            "learning": learning(2 if quick else 7, folder),
            "storing": storing(2 if quick else 7, folder),
            "dask_workers": workers(2 if quick else 6),
        }
    kills = sum(map(len, results.values()))
    ended = sum(kill["had_ended"] for found in results.values() for kill in found)
    summary = {"kills": kills, "of_which_after_the_end": ended, "wrong_results": 0}
    print(summary)
    record.write("scaling_kills", quick, PACKAGES, summary | results)


if __name__ == "__main__":
    main()
