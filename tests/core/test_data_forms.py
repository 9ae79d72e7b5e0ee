"""Forms of data: weights of any place and dtype, foreign dtypes, masked and sparse rows."""

import numpy as np
import pytest
from scipy import sparse

from ipa_core import (
    ArrayTypeError,
    ExactCovariance,
    RandomizedSVD,
    RankError,
    SettingError,
    ShapeError,
    StreamError,
    WeightError,
    allocate_ranks,
    effective_rank,
    excess_error,
    fit_projector,
    load,
    principal_angles,
    rank_for_energy,
    save,
)
from tests.core import oracle

RNG = np.random.default_rng(0)
X = RNG.standard_normal((600, 8)) * np.arange(8, 0, -1.0)
LABELS = RNG.integers(0, 8, 600)


def excess(x, projector):
    return oracle.excess(oracle.moment(x), projector.components)


# Weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_integer_weights_are_refused_with_the_cure(xp, learner_class, dtype):
    x, labels = xp.asarray(X), xp.asarray(LABELS.astype(dtype))
    for call in (
        lambda: learner_class(2).update(x, labels),
        lambda: fit_projector([(x, labels)], 2, learner=learner_class),
        lambda: fit_projector(x, 2).reconstruction_error(x, labels),
    ):
        with pytest.raises(WeightError, match=r"\.bool\(\).*\.float\(\).*for x, _ in loader"):
            call()


def test_labels_of_a_torch_loader_are_refused():
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, TensorDataset

    x, labels = torch.as_tensor(X), torch.as_tensor(LABELS)
    loader = DataLoader(TensorDataset(x, labels), batch_size=100)
    with pytest.raises(WeightError, match="batch 0: .*for x, _ in loader"):
        fit_projector(loader, 2)
    assert excess(X, fit_projector((x for x, _ in loader), 2)) < 1e-9


@pytest.mark.parametrize("make_pair", [tuple, list])
def test_a_pair_as_the_stream_is_refused(make_pair):
    square = X[:8]
    with pytest.raises(StreamError, match=r"\[\(X, weights\)\]"):
        fit_projector(make_pair([square, np.ones(8)]), 2)
    with pytest.raises(StreamError, match=r"\[\(X, weights\)\]"):
        excess_error(fit_projector(X, 2), make_pair([X, np.ones(600)]))
    assert fit_projector(make_pair([X, X[:8]]), 2).samples == 608


@pytest.mark.parametrize("place", ["numpy", "torch", "array_api_strict"])
def test_weights_of_another_library_or_device(xp, device_xp, learner_class, place):
    library = pytest.importorskip(place)
    weights = np.abs(X[:, 0]).astype("float32")
    expected = learner_class(2).update(xp.asarray(X), xp.asarray(weights)).finalize()
    foreign = library.asarray(weights)
    learned = learner_class(2).update(xp.asarray(X), foreign).finalize()
    assert np.array_equal(oracle.host(learned.components), oracle.host(expected.components))
    x = device_xp.asarray(X.astype("float32"))
    on_device = learner_class(2).update(x, foreign).finalize()
    mask = learner_class(2).update(x, library.asarray(weights > 1)).finalize()
    assert on_device.samples == 600 and mask.samples == (weights > 1).sum()
    assert on_device.reconstruction_error(x, foreign) > 0.0


# Dtypes and kinds of arrays --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [">f8", "longdouble", ">f4", "f2"])
def test_dtypes_of_numpy(learner_class, dtype):
    learned = learner_class(2).update(X.astype(dtype)).finalize()
    wide = np.dtype(dtype).itemsize > 4
    assert learned.components.dtype == (np.float64 if wide else np.float32)
    assert learned.components.dtype.isnative
    assert excess(X, learned) < 0.1


def test_byte_order_loses_nothing():
    """In float32, a mean of 1e6 would cost the directions."""
    far = (X + 1e7).astype(">f8")
    learned = ExactCovariance(2, center=True).update(far).finalize()
    assert oracle.excess(oracle.moment(X, center=True), learned.components) < 1e-6


REFUSED = {
    "masked": (lambda: np.ma.masked_greater(X, 20), r"x\.filled\(0\) with weights"),
    "complex": (lambda: X + 1j, "real and imaginary parts"),
    "integers": (lambda: LABELS[:, None], "convert it to float32"),
    "records": (lambda: np.zeros(3, dtype=[("a", "f4"), ("b", "f4")]), "real floating dtype"),
    "list": (lambda: [[1.0, 2.0]], "numpy.asarray"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_arrays_say_the_cure(learner_class, kind):
    make, words = REFUSED[kind]
    learner = learner_class(1)
    with pytest.raises(ArrayTypeError, match=words):
        learner.update(make())
    with pytest.raises(ArrayTypeError, match=words):
        fit_projector(X, 2).project(make())
    assert learner.samples == 0


def test_projectors_refuse_sparse_rows_with_the_cure():
    with pytest.raises(ArrayTypeError, match="dense rows of it"):
        fit_projector(X, 2).project(sparse.csr_matrix(X))


TENSORS = {
    "sparse": (lambda t: t.eye(4).to_sparse(), "to_dense"),
    "nested": (lambda t: t.nested.nested_tensor([t.ones(2, 4), t.ones(1, 4)]), "unbind"),
    "meta": (lambda t: t.ones(2, 4, device="meta"), "meta device"),
    "complex": (lambda t: t.ones(2, 4, dtype=t.complex64), "real and imaginary"),
    "bool": (lambda t: t.ones(2, 4, dtype=t.bool), "float32"),
}


def test_tensors_without_values_in_the_process(learner_class):
    """Such tensors ended in errors of torch, those of a second batch within a product."""
    torch = pytest.importorskip("torch")
    from torch._subclasses import FakeTensorMode

    rows = torch.as_tensor(X)
    fake = FakeTensorMode().from_tensor(rows)
    learner = learner_class(2).update(rows)
    for call in (
        lambda: learner_class(2).update(fake),
        lambda: learner.update(fake),
        lambda: learner.begin_update(fake),
        lambda: learner.update(rows, fake[:, 0]),
        lambda: fit_projector([fake], 2, learner=learner_class),
    ):
        with pytest.raises(ArrayTypeError, match="with values, got a FakeTensor; pass its values"):
            call()
    with pytest.raises(ArrayTypeError, match="got one within torch.func"):
        torch.vmap(lambda x: learner.update(x).finalize().components)(rows[None])
    assert learner.samples == 600


def test_lazily_negated_weights_and_rows_of_eight_bits(learner_class):
    torch = pytest.importorskip("torch")
    rows = torch.as_tensor(X)
    negated = torch.complex(rows, -rows.abs()).conj().imag
    assert negated.is_neg()
    learned = learner_class(2).update(negated, negated[:, 0]).finalize()
    assert learned.samples == 600 and learned.reconstruction_error(negated, negated[:, 0]) >= 0
    short = rows.to(torch.float8_e4m3fn)
    projector = learner_class(2).update(short).finalize()
    expected = projector.project(short.float())
    assert torch.equal(projector.project(short), expected)
    both = projector.to(torch, dtype=short.dtype).project(short)
    assert both.dtype == torch.float32
    torch.testing.assert_close(both, expected, atol=0.2, rtol=0.2)
    assert torch.equal(
        projector.whitening().whiten(short), projector.whitening().whiten(short.float())
    )


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
@pytest.mark.parametrize("kind", TENSORS)
def test_refused_tensors_say_the_cure(learner_class, kind):
    torch = pytest.importorskip("torch")
    make, words = TENSORS[kind]
    with pytest.raises(ArrayTypeError, match=words):
        learner_class(1).update(make(torch))
    with pytest.raises(ArrayTypeError, match=f"batch 0: .*{words}"):
        fit_projector([make(torch)], 1, learner=learner_class)


def test_dask_arrays_in_a_list_or_given_to_a_learner(learner_class):
    da = pytest.importorskip("dask.array")
    with pytest.raises(ArrayTypeError, match=r"x\.compute\(\)"):
        learner_class(2).update(da.ones((4, 3)))
    with pytest.raises(StreamError, match=r"batch 0.*x\.compute\(\)"):
        fit_projector([da.ones((4, 3))], 2, learner=learner_class)


class Surprising(np.ndarray):
    """A subclass with another product."""

    def __matmul__(self, other):
        return np.zeros_like(np.asarray(self) @ np.asarray(other))


def test_subclasses_are_plain_arrays(learner_class):
    expected = learner_class(2).update(X, np.abs(X[:, 0])).finalize()
    learned = learner_class(2).update(X.view(Surprising), np.abs(X[:, 0])).finalize()
    assert np.array_equal(learned.components, expected.components)
    assert type(learned.components) is np.ndarray


# Streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ({"q": X}, r"value\[name\]"),
        ([{"x": X}], "batch 0.*dict"),
        (b"x.npy", "os.fsdecode"),
        (RandomizedSVD, "got ABCMeta"),
    ],
)
def test_streams_that_only_look_like_it(stream, words):
    with pytest.raises(StreamError, match=words):
        fit_projector(stream, 1)


def test_open_files_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", X)
    with (tmp_path / "x.npy").open("rb") as file, pytest.raises(StreamError, match="the path"):
        fit_projector(file, 1)


# Settings --------------------------------------------------------------------------------------


def test_ranks_of_numpy(learner_class):
    for rank in (np.int64(2), np.uint8(2), np.asarray(2)):
        learner = learner_class(rank)
        assert type(learner.rank) is int and learner.rank == 2
    projector = fit_projector(X, np.int64(3))
    assert projector.truncate(np.int64(2)).rank == 2
    with pytest.raises(RankError, match="between 1 and 3"):
        projector.truncate(2.0)


@pytest.mark.parametrize("seed", [None, -1, 1.5, np.random.default_rng(0), "0"])
def test_seeds(learner_class, seed):
    with pytest.raises(SettingError, match="seed to be an integer of at least 0"):
        learner_class(2, seed=seed)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (RandomizedSVD(2), "callable.*learner=RandomizedSVD"),
        ("RandomizedSVD", "callable"),
        (int, "to be a Learner, got int"),
        (dict, "learner=RandomizedSVD"),
        (lambda rank: RandomizedSVD(rank, oversampl=3), "oversampl"),
    ],
)
def test_factories(factory, words):
    with pytest.raises(SettingError, match=words):
        fit_projector(X, 2, learner=factory)


# Projectors and metrics ------------------------------------------------------------------------


def test_project_in_another_place_says_to_move_the_projector(xp, device_xp):
    projector = fit_projector(X, 2)
    moved = projector.to(device_xp, device=device_xp.device)
    for p, x in (
        (projector, device_xp.asarray(X.astype("float32"))),
        (moved, np.asarray(X)),
        (moved, pytest.importorskip("array_api_strict").asarray(X)),
    ):
        with pytest.raises(ArrayTypeError, match=r"projector\.to"):
            p.project(x)
        with pytest.raises(ArrayTypeError, match=r"projector\.to"):
            p.reconstruction_error(x)
    with pytest.raises(ArrayTypeError, match=r"projector\.to"):
        principal_angles(projector, moved)


def test_project_mixes_floating_dtypes(xp):
    projector = fit_projector(xp.asarray(X), 2)
    codes = projector.project(xp.asarray(X.astype("float32")))
    assert np.allclose(oracle.host(codes), X @ oracle.host(projector.components).T, atol=1e-4)


def test_metrics_of_other_widths_and_objects():
    projector = fit_projector(X, 2)
    with pytest.raises(ShapeError, match="8 features.*got shape"):
        excess_error(projector, X[:, :5])
    for metric in (effective_rank, lambda p: rank_for_energy(p, 0.5), lambda p: excess_error(p, X)):
        with pytest.raises(ArrayTypeError, match="expected a Projector, got list"):
            metric([projector])
    with pytest.raises(ArrayTypeError, match="expected a Projector, got ndarray"):
        principal_angles(projector, projector.components)


def test_spectra_are_arrays_of_any_library(xp, device_xp):
    expected = allocate_ranks({"q": [9, 1, 0], "up": [8, 7, 6]}, budget=4)
    for library in (xp, device_xp):
        q, up = (library.asarray(np.array(e, dtype="float32")) for e in ([9, 1, 0], [8, 7, 6]))
        assert allocate_ranks({"q": q, "up": up}, budget=np.int64(4)) == expected
    for spectrum in (3.0, "987", [1.0, np.nan], fit_projector(X, 2)):
        with pytest.raises(RankError, match="layer 'q'"):
            allocate_ranks({"q": spectrum}, budget=1)


def test_excess_error_of_half_precision_is_computed_in_float32():
    projector = fit_projector(X + 100, 2, learner=lambda rank: ExactCovariance(rank, center=True))
    half = (X + 100).astype("float16")
    assert excess_error(projector, half) == pytest.approx(
        excess_error(projector, half.astype("float64")), abs=1e-3
    )


# Devices and half precision --------------------------------------------------------------------


def test_projectors_on_devices(device_xp, tmp_path):
    projector = fit_projector(X, 3)
    there = projector.to(device_xp, device=device_xp.device)
    assert str(there.components.dtype).endswith(device_xp.dtype("float64"))
    save(there, tmp_path / "p.safetensors")
    again = load(tmp_path / "p.safetensors", library=device_xp, device=device_xp.device)
    assert again.components.device == device_xp.device
    assert float(device_xp.max(principal_angles(again, there))) < 1e-6
    assert excess_error(there, device_xp.asarray(X.astype("float32"))) < 1e-5
    for dtype in ("float32", device_xp.dtype("float64")):
        converted = projector.to(
            device_xp, device=device_xp.device, dtype=getattr(device_xp, dtype)
        )
        assert str(converted.energies.dtype).endswith(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_projectors_of_half_precision(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    half = fit_projector(X, 3).to(torch, dtype=getattr(torch, dtype))
    assert half.components.dtype == getattr(torch, dtype)
    assert half.to(torch).components.dtype == getattr(torch, dtype)
    host = half.to(np)
    assert host.components.dtype == ("float32" if dtype == "bfloat16" else "float16")
    assert np.array_equal(host.components, half.components.float().numpy())
    save(half, tmp_path / "p.safetensors")
    again = load(tmp_path / "p.safetensors", library=torch)
    assert torch.equal(again.components.to(half.components.dtype), half.components)
    assert repr(half).startswith("Projector(rank=3")


@pytest.mark.parametrize(
    ("library", "kwargs"),
    [
        ("torch", {}),
        (pytest, {}),
        (np, {"dtype": "no dtype"}),
        (np, {"dtype": np.int64}),
        (np, {"device": "cuda"}),
    ],
)
def test_to_refuses_other_libraries_devices_and_dtypes(library, kwargs):
    with pytest.raises((SettingError, ArrayTypeError)):
        fit_projector(X, 3).to(library, **kwargs)
