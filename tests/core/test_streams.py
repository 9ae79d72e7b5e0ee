"""Every kind of stream through `fit_projector`."""

import os
import sys
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import save_file

from ipa_core import (
    EmptyStreamError,
    ExactCovariance,
    FileFormatError,
    MissingDependencyError,
    NonFiniteError,
    ReconstructionAutoencoder,
    StreamError,
    fit_projector,
)
from ipa_core.io import prefetch, streams
from tests.core import oracle

X = np.random.default_rng(0).standard_normal((20_000, 5)).astype("float32") * [5, 4, 3, 2, 1]
X = X.astype("float32")
fit = partial(fit_projector, rank=2, learner=ExactCovariance)


def assert_fits(projector, x=X):
    assert oracle.excess(oracle.moment(x), projector.components) < 1e-5
    assert projector.samples == len(x)


def test_array(xp):
    assert_fits(fit(xp.asarray(X)))


def test_lists_generators_and_ragged_batches():
    parts = np.split(X, [3, 3, 700, 19_999])
    assert_fits(fit(parts))
    assert_fits(fit(part for part in parts))
    assert_fits(fit(iter(parts)))


def test_pairs_of_batch_and_weights():
    keep = np.arange(len(X)) % 2 == 0
    assert_fits(fit([(X[:9000], keep[:9000]), (X[9000:], keep[9000:])]), X[keep])


def test_torch_data_loader():
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, TensorDataset

    x = torch.as_tensor(X)
    assert_fits(fit(DataLoader(x, batch_size=300)))
    assert_fits(fit(DataLoader(TensorDataset(x), batch_size=300)))
    keep = torch.arange(len(X)) % 2 == 0
    assert_fits(fit(DataLoader(TensorDataset(x, keep), batch_size=300)), X[::2])


def test_dlpack():
    class Foreign:
        def __dlpack__(self, **settings):
            return X.__dlpack__(**settings)

        def __dlpack_device__(self):
            return X.__dlpack_device__()

    assert_fits(fit(Foreign()))
    assert_fits(fit([Foreign()]))


def test_npy_is_memory_mapped(tmp_path):
    np.save(tmp_path / "x.npy", X)
    assert_fits(fit(tmp_path / "x.npy"))
    assert_fits(fit(str(tmp_path / "x.npy")))
    assert_fits(fit(np.load(tmp_path / "x.npy", mmap_mode="r")))
    (batch, _), *_ = streams.iterate(tmp_path / "x.npy")
    assert isinstance(batch, np.memmap)
    assert len(batch) == 8192


def test_safetensors_and_folders_of_shards(tmp_path):
    save_file({"b": X[100:9000], "a": X[:100]}, tmp_path / "0.safetensors")
    assert_fits(fit(tmp_path / "0.safetensors"), X[:9000])
    np.save(tmp_path / "1.npy", X[9000:])
    (tmp_path / ".hidden").write_text("not a shard")
    assert_fits(fit(tmp_path))


def test_lists_of_paths(tmp_path):
    np.save(tmp_path / "1.npy", X[:9000])
    save_file({"x": X[9000:]}, tmp_path / "0.safetensors")
    assert_fits(fit([tmp_path / "1.npy", str(tmp_path / "0.safetensors")]))
    assert_fits(fit(path for path in tmp_path.iterdir()))


def test_zarr(tmp_path):
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(tmp_path / "x.zarr", shape=X.shape, chunks=(3000, 5), dtype="f4")
    array[:] = X
    assert_fits(fit(tmp_path / "x.zarr"))
    assert_fits(fit(tmp_path))
    with pytest.raises(FileNotFoundError):
        fit(tmp_path / "absent.zarr")
    (tmp_path / "broken.zarr").mkdir()
    with pytest.raises(FileFormatError, match=r"broken\.zarr"):
        fit(tmp_path / "broken.zarr")


def test_zarr_without_zarr(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    (tmp_path / "x.zarr").mkdir()
    with pytest.raises(MissingDependencyError, match=r"ipa-projectors\[dask\]"):
        fit(tmp_path / "x.zarr")


def test_bfloat16_shards(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    half = torch.as_tensor(X).bfloat16()
    save_torch({"x": half}, tmp_path / "x.safetensors")
    assert_fits(fit(tmp_path / "x.safetensors"), half.float().numpy())


def test_bfloat16_without_torch(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    save_torch({"x": torch.ones(2, 2).bfloat16()}, tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"ipa-projectors\[torch\]"):
        fit(tmp_path / "x.safetensors")


def test_several_passes_need_a_stream_that_can_be_read_again():
    learner_class = partial(ReconstructionAutoencoder, epochs=3)
    with pytest.raises(StreamError, match="can be read 3 times.*one-shot generator"):
        fit_projector((x for x in [X]), 2, learner=learner_class)
    assert fit_projector([X], 2, learner=learner_class).samples == len(X)


def test_rows_count_once_over_several_passes():
    learner = ReconstructionAutoencoder(2, epochs=2)
    for _ in range(learner.passes):
        learner.update(X)
    assert learner.finalize().samples == len(X)


def test_a_bad_batch_is_named():
    bad = X[:10].copy()
    bad[2] = np.nan
    with pytest.raises(NonFiniteError, match="batch 1: expected finite values"):
        fit([X[:10], bad])


@pytest.mark.parametrize("stream", [[], iter([]), np.ones((0, 4)), [np.ones((0, 4))]])
def test_nothing_to_learn_from(stream):
    with pytest.raises(EmptyStreamError, match="keeps some rows"):
        fit(stream)


@pytest.mark.parametrize(
    ("stream", "words"),
    [(3, "got int"), ([3], "batch 0"), ([(X, X, X)], "batch 0"), ([{"x": X}], "got dict")],
)
def test_other_objects_are_refused(stream, words):
    with pytest.raises(StreamError, match=words):
        fit(stream)


def test_files_without_activations_are_refused(tmp_path):
    with pytest.raises(StreamError, match="in the folder"):
        fit(tmp_path)
    (tmp_path / "x.txt").write_text("1 2 3")
    with pytest.raises(StreamError, match=r"\.npy, .*or \.feather file"):
        fit(tmp_path / "x.txt")
    (tmp_path / "x.npy").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match=r"x\.npy"):
        fit(tmp_path / "x.npy")
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(FileFormatError, match="object"):
        fit(tmp_path / "object.npy")
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match=r"x\.safetensors"):
        fit(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        fit(tmp_path / "absent.npy")
    with pytest.raises(FileNotFoundError):
        fit(tmp_path / "absent.safetensors")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="prefetching needs posix_fadvise")
def test_the_next_bytes_are_prefetched(tmp_path, monkeypatch):
    wide = np.ones((20_000, 64), dtype="float32")
    files = [tmp_path / "0.npy", tmp_path / "1.npy"]
    for file in files:
        np.save(file, wide)
    advised = {}

    def advise(number, start, size, kind):
        assert size <= 1 << 20, "Linux would cut it"
        name = os.path.basename(os.readlink(f"/proc/self/fd/{number}"))
        advised[name] = max(advised.get(name, 0), start + size)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    beginning = 3 << 20  # a batch and a half
    monkeypatch.setattr(prefetch.prefetch, "__defaults__", (0, beginning))
    sizes = {file.name: file.stat().st_size for file in files}
    for number, (batch, _) in enumerate(streams.iterate(tmp_path)):
        assert advised["0.npy"] >= min((number + 2) * batch.nbytes, sizes["0.npy"])
        assert advised["1.npy"] >= beginning
    assert number == 5
