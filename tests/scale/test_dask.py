"""Dask arrays and shards, on a real cluster of processes."""

import os
import signal
import time
import weakref
from functools import partial

import numpy as np
import pytest

from ipa_core import (
    ActivationStore,
    EmptyStreamError,
    ExactCovariance,
    FileFormatError,
    NonFiniteError,
    RandomizedSVD,
    ReconstructionAutoencoder,
    StreamError,
    fit_projector,
)
from tests.scale import runs

da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")
dask_backend = pytest.importorskip("ipa_core.dask_backend")


SPECTRUM = np.arange(1, 33, dtype="float32")[::-1] ** 0.5


def rows(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 32)).astype("float32") * SPECTRUM


def excess(projector, x):
    x = x.astype(float)
    values = np.linalg.eigvalsh(x.T @ x)
    p = projector.components.astype(float)
    return (np.sum(x**2) - np.sum((x @ p.T) ** 2)) / values[: -len(p)].sum() - 1


@pytest.fixture(scope="module")
def cluster():
    """Three worker processes of one thread each."""
    cluster = distributed.LocalCluster(
        n_workers=3, threads_per_worker=1, memory_limit="2GB", dashboard_address=":0"
    )
    with distributed.Client(cluster) as client:
        yield client
        # A cluster that is closed too early waits without end for the replacement of the killed
        # worker, which looks for a scheduler that is gone.
        client.wait_for_workers(3, timeout=60)
    cluster.close(timeout=60)


X = rows(20_000)


@pytest.mark.parametrize("learner", [ExactCovariance, RandomizedSVD])
@pytest.mark.parametrize("chunks", [(1000, 32), (3001, 7), (20_000, 32)])
def test_array_without_a_cluster(chunks, learner):
    projector = fit_projector(da.from_array(X, chunks=chunks), 4, learner=learner)
    assert projector.samples == len(X)
    assert excess(projector, X) < (1e-5 if learner is ExactCovariance else 0.05)


def test_axes_before_the_last_are_rows():
    stacked = da.from_array(X.reshape(40, 500, 32), chunks=(7, 200, 10))
    projector = fit_projector(stacked, 4, learner=ExactCovariance)
    assert projector.samples == len(X)
    assert excess(projector, X) < 1e-5


def test_array_on_a_cluster(cluster):
    lazy = da.from_array(X, chunks=(500, 32)) * 2.0
    for source in (lazy, lazy.persist()):
        assert excess(fit_projector(source, 4, learner=ExactCovariance), X) < 1e-5


def shards(folder, x=X):
    """Write a shard of each kind, and return their paths."""
    import zarr
    from safetensors.numpy import save_file

    parts = np.array_split(x, 12)
    for number, part in enumerate(parts):
        path = folder / f"{number:02d}"
        if number % 3 == 0:
            np.save(path.with_suffix(".npy"), part)
        elif number % 3 == 1:
            save_file({"rows": part}, path.with_suffix(".safetensors"))
        else:
            array = zarr.create_array(
                path.with_suffix(".zarr"), shape=part.shape, chunks=(500, 32), dtype="f4"
            )
            array[:] = part
    return sorted(folder.iterdir())


def test_shards_of_all_kinds(cluster, tmp_path):
    paths = shards(tmp_path)
    exact = partial(dask_backend.fit_projector, rank=4, learner=ExactCovariance)
    for source in (paths, map(str, paths), tmp_path):
        projector = exact(source)
        assert projector.samples == len(X)
        assert excess(projector, X) < 1e-5
    sequential = fit_projector(paths, 4, learner=ExactCovariance)
    assert excess(sequential, X) < 1e-5
    assert excess(dask_backend.fit_projector(paths, 4), X) < 0.05
    assert exact(paths[0]).samples == len(X) // 12 + 1


def test_zarr_as_a_dask_array(cluster, tmp_path):
    da.from_array(X, chunks=(3000, 32)).to_zarr(tmp_path / "x.zarr")
    projector = fit_projector(da.from_zarr(tmp_path / "x.zarr"), 4, learner=ExactCovariance)
    assert excess(projector, X) < 1e-5


def test_layer_of_a_store(cluster, tmp_path):
    store_activations = pytest.importorskip("ipa_torch").store_activations
    store_activations(
        runs.model(), runs.batches(8), tmp_path, targets=["query"], shard_bytes=1, progress=False
    )
    layer = ActivationStore(tmp_path)["query"]
    assert len(layer.shards) == 8
    projector = dask_backend.fit_projector(layer, 4, learner=ExactCovariance)
    assert projector.samples == layer.samples
    assert excess(projector, np.concatenate([*layer]).astype("float32")) < 1e-4
    victim = tmp_path / layer.shards[3].file
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match=victim.name):
        dask_backend.fit_projector(layer, 4)


class Tracked(np.ndarray):
    """An array that counts its fellows."""

    alive = 0
    most = 0

    @classmethod
    def of(cls, block):
        counted = block.view(cls)
        cls.alive += 1
        cls.most = max(cls.most, cls.alive)
        weakref.finalize(counted, cls.end)
        return counted

    @classmethod
    def end(cls):
        cls.alive -= 1


def test_a_thread_holds_one_block_at_a_time(cluster):
    lazy = da.random.default_rng(0).standard_normal((20_000, 32), chunks=(500, 32))
    lazy = lazy.map_blocks(Tracked.of, meta=X[:0])
    fit_projector(lazy, 4)
    most = cluster.run(lambda: Tracked.most)
    assert sum(most.values()) >= 1
    assert max(most.values()) <= 2, most


def slow(block, folder):
    """Note who works on a block, and take one's time."""
    (folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
    time.sleep(0.1)
    return block


@pytest.mark.slow
def test_a_worker_is_killed_on_the_way(cluster, tmp_path):
    lazy = da.from_array(X, chunks=(500, 32)).map_blocks(slow, folder=tmp_path, dtype=X.dtype)
    # Asking for the type calls the function on an empty block.
    for path in tmp_path.iterdir():
        path.unlink()
    import threading

    projectors = []
    thread = threading.Thread(
        target=lambda: projectors.append(fit_projector(lazy, 4, learner=ExactCovariance))
    )
    thread.start()
    end = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 12:
        assert time.monotonic() < end, "no worker started"
        time.sleep(0.01)
    victim = int(min(tmp_path.iterdir()).name.split("-")[0])
    os.kill(victim, signal.SIGKILL)
    thread.join(timeout=120)
    (projector,) = projectors
    assert len(list(tmp_path.iterdir())) > 40, "what the victim had learned is learned again"
    assert projector.samples == len(X)
    assert excess(projector, X) < 1e-5


def test_unfit_blocks_are_named(cluster, tmp_path):
    bad = X.copy()
    bad[7200] = np.nan
    with pytest.raises(NonFiniteError, match="block 7: expected finite"):
        fit_projector(da.from_array(bad, chunks=(1000, 32)), 4)
    np.save(tmp_path / "0.npy", X)
    (tmp_path / "1.npy").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match=r"1\.npy"):
        dask_backend.fit_projector(tmp_path, 4)


def test_what_is_no_source():
    with pytest.raises(StreamError, match="got int"):
        dask_backend.fit_projector(3, 2)
    with pytest.raises(StreamError, match="got Item"):
        fit_projector(pytest.importorskip("dask.bag").from_sequence([1]).sum(), 2)
    with pytest.raises(StreamError, match="one pass"):
        fit_projector(da.ones((4, 4)), 2, learner=partial(ReconstructionAutoencoder, epochs=2))
    with pytest.raises(EmptyStreamError):
        dask_backend.fit_projector([], 2)
    with pytest.raises(EmptyStreamError):
        fit_projector(da.ones((0, 4)), 2)


def test_the_core_does_not_import_dask():
    code = "import sys, ipa_core; sys.exit('dask' in sys.modules or 'zarr' in sys.modules)"
    import subprocess
    import sys

    assert subprocess.run([sys.executable, "-c", code], env=runs.environment()).returncode == 0
