"""Numerical stress: outliers, far means, extreme scales, degenerate data, long streams."""

import numpy as np
import pytest

from ipa_core import (
    ExactCovariance,
    HebbianRule,
    IncrementalPCA,
    NonFiniteError,
    RandomizedSVD,
    ReconstructionAutoencoder,
    excess_error,
    fit_projector,
)
from ipa_core._array import dtypes
from tests.core import oracle

ROWS, FEATURES, RANK = 3000, 40, 4
ACCURATE = [ExactCovariance, IncrementalPCA, RandomizedSVD]  # whatever the order of the rows


def spectrum_rows(seed=0, rows=ROWS, decay=0.7, features=FEATURES):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((features, features)))[0]
    return (rng.standard_normal((rows, features)) * np.arange(1, features + 1) ** -decay) @ basis


def allowed(learner_class):
    return {"exact": 1e-5, "bounded": 0.01, "statistical": 0.1}[learner_class.guarantee.kind]


def fitted(xp, learner_class, x, dtype, **settings):
    learner = learner_class(RANK, **settings)
    for part in np.array_split(np.asarray(x, dtype=dtype), 7):
        learner.update(xp.asarray(part))
    return learner.finalize()


def excess(x, projector, center=False):
    return oracle.excess(oracle.moment(x, center=center), projector.components)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("float32", 1e-15), ("float32", 1e15), ("float64", 1e-100), ("float64", 1e100)],
)
def test_scales(xp, learner_class, dtype, scale):
    x = spectrum_rows()
    projector = fitted(xp, learner_class, scale * x, dtype)
    assert excess(x, projector) < allowed(learner_class)
    energy = (x**2).sum(axis=1).mean()
    assert projector.total_energy / scale / scale == pytest.approx(energy, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_scales_out_of_range_are_refused(xp, learner_class, scale):
    with pytest.raises(NonFiniteError, match="float32 can hold"):
        fitted(xp, learner_class, scale * spectrum_rows(), "float32")


@pytest.mark.parametrize("rule", [HebbianRule, ReconstructionAutoencoder])
@pytest.mark.parametrize("seed", [53, 80, 125, 205, 271])
def test_close_eigenvalues(xp, rule, seed):
    """Seeds whose random start was nearly orthogonal to the leading direction."""
    x = np.random.default_rng(seed).standard_normal((20_000, 2)) * [1, 0.9]
    projector = rule(1).update(xp.asarray(x.astype(np.float32))).finalize()
    assert excess(x, projector) < 0.1


def test_rows_whose_sums_leave_the_range(xp, learner_class):
    x = spectrum_rows()
    x *= 5e18 / np.abs(x).max()
    assert excess(x, fitted(xp, learner_class, x, "float32")) < allowed(learner_class)


@pytest.mark.parametrize("learner_class", ACCURATE)
def test_rows_that_outgrow_the_first(xp, learner_class):
    x = spectrum_rows()
    x[1000:] *= 5e18 / np.abs(x).max()
    assert excess(x, fitted(xp, learner_class, x, "float32")) < allowed(learner_class)


def test_outlier_coordinate(xp, learner_class):
    x = spectrum_rows()
    x[:, 7] *= 1000
    assert excess(x.astype("float32"), fitted(xp, learner_class, x, "float32")) < allowed(
        learner_class
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mean_far_from_zero(xp, learner_class, dtype):
    x = (spectrum_rows() + 1e4 * np.sin(np.arange(FEATURES))).astype(dtype)
    projector = fitted(xp, learner_class, x, dtype, center=True)
    assert excess(x.astype("float64"), projector, center=True) < allowed(learner_class)
    mean = x.astype("float64").mean(axis=0)
    assert np.abs(oracle.host(projector.mean) - mean).max() < 1e-6 * 1e4


@pytest.mark.parametrize("learner_class", ACCURATE)
@pytest.mark.parametrize("features", [20, FEATURES])
def test_mean_far_from_zero_about_the_origin(learner_class, features):
    x = (spectrum_rows()[:, :features] + 1000).astype("float32")
    assert excess(x.astype("float64"), fitted(np, learner_class, x, "float32")) < allowed(
        learner_class
    )


def test_weights_along_a_direction(learner_class):
    x = spectrum_rows(rows=20_000)
    weights = np.where(x[:, 5] > 0.2, 10.0, 0.1)
    learner = learner_class(RANK)
    for rows, row_weights in zip(np.split(x, 4), np.split(weights, 4), strict=True):
        learner.update(rows, row_weights)
    assert oracle.excess(oracle.moment(x, weights), learner.finalize().components) < allowed(
        learner_class
    )


@pytest.mark.parametrize("learner_class", ACCURATE)
def test_a_subspace_that_appears_within_a_batch(learner_class):
    x = spectrum_rows(rows=40_000)
    x[29_000:] = 3 * x[29_000:, ::-1]
    learner = learner_class(RANK).update(x[:16_384]).update(x[16_384:])
    assert excess(x, learner.finalize()) < allowed(learner_class)


def test_equal_rows(xp, learner_class):
    x = np.ones((500, 1)) * np.arange(1.0, FEATURES + 1)
    projector = fitted(xp, learner_class, x, "float32")
    direction = x[:1] / np.linalg.norm(x[0])
    assert oracle.angle(direction, projector.components[:1, :]) < 1e-3
    centered = fitted(xp, learner_class, x, "float32", center=True)
    assert centered.total_energy < 1e-8 * projector.total_energy
    assert_orthonormal(centered)


def test_all_zeros(xp, learner_class):
    projector = fitted(xp, learner_class, np.zeros((300, FEATURES)), "float32")
    assert projector.captured() == 1.0
    assert (oracle.host(projector.energies) == 0).all()
    assert_orthonormal(projector)


def assert_orthonormal(projector):
    p = oracle.host(projector.components)
    assert np.abs(p @ p.T - np.eye(len(p))).max() < 1e-5


def test_exactly_low_rank(xp, learner_class):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6000, 2)) @ rng.standard_normal((2, FEATURES))
    c = oracle.moment(x)
    projector = fitted(xp, learner_class, x, "float64")
    assert oracle.residual(c, projector.components) < 1e-8 * np.trace(c)
    assert_orthonormal(projector)


def test_fewer_rows_than_rank(xp, learner_class):
    x = spectrum_rows(rows=2)
    projector = fitted(xp, learner_class, x, "float64")
    assert projector.components.shape == (RANK, FEATURES)
    assert_orthonormal(projector)
    if learner_class.guarantee.kind != "statistical":
        c = oracle.moment(x)
        assert oracle.residual(c, projector.components) < 1e-10 * np.trace(c)


def test_half_precision_is_computed_in_float32(learner_class):
    torch = pytest.importorskip("torch")
    # The squares of these leave float16's range.
    x = torch.as_tensor(300 * spectrum_rows())
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        projector = learner_class(RANK).update(half).finalize()
        assert projector.components.dtype == torch.float32
        assert excess(half.double().numpy(), projector) < allowed(learner_class)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("center", [False, True])
def test_no_more_energy_than_the_rows_have(learner_class, center, dtype):
    """Rounding on nearly low-rank rows gave up to 1.5e-13 more, in float64."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = (rng.standard_normal((600, 1)) @ rng.standard_normal((1, 35))).astype(dtype)
        x[400:] = 5 * x[400:, ::-1]
        projector = learner_class(2, center=center).update(x).finalize()
        limit = projector.total_energy * (1 + 4 * np.finfo(dtype).eps)
        assert 0 < projector.energies.sum() <= limit


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [512, 700])
def test_bfloat16_rows_are_multiplied_as_they_are(rows, weighted, monkeypatch):
    """The result is that of their float32 copies, and no copy is made."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(dtypes, "_is_fast_in_half", lambda torch, on: True)
    decay = torch.arange(1, 301) ** -0.3
    x = (torch.randn(20 * rows, 300, generator=torch.manual_seed(0)) * decay).bfloat16()
    weights = torch.rand(20 * rows) if weighted else torch.ones(20 * rows)
    half, single = RandomizedSVD(RANK), RandomizedSVD(RANK)
    for batch, w in zip(x.split(rows), weights.split(rows), strict=True):
        taken = half.begin_update(batch, w).batch.x
        is_half = half._segment is not None and half._segment.is_half
        assert taken.dtype == (torch.bfloat16 if is_half else torch.float32)
        half.update(batch, w)
        single.update(batch.float(), w)
    assert is_half
    assert torch.equal(half.finalize().components, single.finalize().components)


def test_numpy_float16(learner_class):
    projector = learner_class(RANK).update(spectrum_rows().astype("float16")).finalize()
    assert projector.components.dtype == np.float32


@pytest.mark.slow
def test_ten_million_rows_do_not_drift(learner_class):
    x = np.ascontiguousarray(spectrum_rows(rows=8192)[:, :36]).astype("float32")
    once = learner_class(2).update(x).finalize()
    learner = learner_class(2)
    for _ in range(1221):
        learner.update(x)
    projector = learner.finalize()
    c = oracle.moment(x)
    assert projector.samples == 1221 * 8192 > 10**7
    assert projector.total_energy == pytest.approx(once.total_energy, rel=1e-6)
    assert oracle.excess(c, projector.components) < allowed(learner_class) / 10
    captured = np.trace(c) - oracle.residual(c, projector.components)
    assert oracle.host(projector.energies).sum() == pytest.approx(captured, rel=0.01)


def test_without_float64(monkeypatch):
    """Without float64 in the library, the float32 core keeps the documented bounds."""
    torch = pytest.importorskip("torch")
    from ipa_core import _array, _linalg

    for module in (_array, _linalg):
        monkeypatch.setattr(module, "wide_dtype", lambda xp, on: torch.float32)
    x = spectrum_rows().astype("float32")
    outlier = x.copy()
    outlier[:, 7] *= 1000
    for cls in ACCURATE:
        plain = cls(RANK).update(torch.as_tensor(x)).finalize()
        assert excess(x, plain) < 0.01
        hard = cls(RANK).update(torch.as_tensor(outlier)).finalize()
        assert excess(outlier, hard) < 0.05


def test_decompositions_in_slices(xp, monkeypatch):
    """As of the whole, the last slice having fewer rows than columns, and one column being zero."""
    from ipa_core import _linalg

    rows = np.random.default_rng(0).standard_normal((50, 163)).astype("float32")
    rows[7] = 0.0
    x = xp.asarray(rows)
    whole = _linalg.truncate_rows(xp, [x], 20)
    monkeypatch.setattr(_linalg, "_SLICE", 40)
    monkeypatch.setattr(_linalg, "_ENTRIES", 1)
    basis = np.asarray(_linalg.orthonormal_columns(xp, x.T))
    assert np.allclose(basis.T @ basis, np.eye(50), atol=1e-5)
    assert np.allclose(basis @ (basis.T @ rows.T), rows.T, atol=1e-4)
    ordered = np.triu(basis.T @ rows.T)
    assert np.allclose(basis @ ordered, rows.T, atol=1e-4)
    pieces = [x[:11, :], x[11:, :]]
    sliced = np.asarray(_linalg.truncate_rows(xp, pieces, 20))
    whole = np.asarray(whole)
    assert np.allclose(sliced.T @ sliced, whole.T @ whole, atol=1e-3)


def test_accelerators_leave_small_decompositions_to_the_host(monkeypatch, learner_class):
    torch = pytest.importorskip("torch")
    from array_api_compat import torch as xp

    from ipa_core._array import symmetric_eigen

    x = spectrum_rows()
    plain = fitted(xp, learner_class, x, "float32")
    monkeypatch.setattr(symmetric_eigen, "_on_accelerator", lambda array: True)
    monkeypatch.setattr(xp.linalg, "eigh", None)
    projector = fitted(xp, learner_class, x, "float32")
    assert projector.components.dtype == torch.float32
    assert oracle.angle(plain.components, projector.components) < 1e-3


def sparse_rows_without_drift():
    g = np.random.default_rng(0)
    n, d, r = 60_000, 1000, 16
    rare = g.random(n) < r / 2000
    x = np.zeros((n, r + d), "f4")
    column = np.where(rare, g.integers(0, r, n), r + g.integers(0, d, n))
    x[np.arange(n), column] = np.where(rare, 30, 1)
    return x


def late_subspace():
    g = np.random.default_rng(0)
    x = np.zeros((40_000, 1000), "f4")
    x[:, :500] = g.standard_normal((40_000, 500))
    x[36_000:, 500:516] = 10 * g.standard_normal((4000, 16))
    return x


def outlier_dimension():
    g = np.random.default_rng(0)
    z = g.standard_normal((20_000, 768)) * np.arange(1, 769) ** -0.3
    z[:, 5] = 3000 * (1 + 0.1 * g.standard_normal(20_000))
    return z.astype("f4")


def cauchy_entries():
    return np.random.default_rng(0).standard_cauchy((20_000, 600)).astype("f4")


@pytest.mark.parametrize(
    ("stream", "most"),
    [
        (sparse_rows_without_drift, 1e-6),
        (late_subspace, 1e-3),
        (outlier_dimension, 1e-3),
        (cauchy_entries, 1e-4),
    ],
)
def test_streams_that_broke_the_former_sketch(stream, most):
    x = stream()
    assert excess(x, RandomizedSVD(16).update(x).finalize()) < most


@pytest.mark.parametrize("factor", [100, 1000, 1e5])
def test_a_huge_row_at_any_place(xp, factor):
    """In half precision its rounding must not hide the other rows, in the first block neither."""
    for place in range(0, 1600, 64):
        x = spectrum_rows(seed=place, rows=1600, decay=0.4, features=200)
        x[place] *= factor
        x = x.astype(np.float32)
        span = oracle.span(RandomizedSVD(5).update(xp.asarray(x)).finalize().components)
        assert oracle.excess(oracle.moment(x), span) < 0.03, place


def suddenly(start, rows):
    return (np.arange(rows) >= start).astype("f4")


def gradually(start, rows):
    return np.clip((np.arange(rows) - start) / 300, 0, 1).astype("f4")


@pytest.mark.parametrize(
    ("appear", "size", "count", "rank"),
    [
        (suddenly, 5.0, 4, 4),
        (suddenly, 3.0, 8, 8),
        (suddenly, 2.5, 16, 16),
        (gradually, 5.0, 4, 4),
    ],
)
def test_directions_that_appear_at_any_row(appear, size, count, rank):
    """The first blocks of a basis are no measure of the usual: they may be new themselves."""
    g = np.random.default_rng(0)
    rows, features = 8000, 400
    x = np.zeros((rows, features), "f4")
    x[:, :200] = g.standard_normal((rows, 200))
    new = size * g.standard_normal((rows, count)).astype("f4")
    for start in range(300, 7000, 311):
        x[:, 200 : 200 + count] = new * appear(start, rows)[:, None]
        assert excess(x, RandomizedSVD(rank).update(x).finalize()) < 0.05, start


@pytest.mark.parametrize("learner_class", [ExactCovariance, IncrementalPCA, RandomizedSVD])
@pytest.mark.parametrize("features", [30, 200])
def test_directions_eight_decades_apart(learner_class, features):
    g = np.random.default_rng(0)
    x = g.standard_normal((3000, features)) * np.arange(1, features + 1) ** -0.5
    rotation = np.linalg.qr(g.standard_normal((features, features)))[0]
    x[:, :2] *= 1e8
    projector = learner_class(8).update(x @ rotation).finalize()
    # Judged by the part of P outside the two directions: no moment of x holds sixteen decades.
    rest = x[:, 2:].T @ x[:, 2:]
    inside = (projector.components @ rotation.T)[:, 2:]
    captured = np.linalg.svd(inside)[2][:6]
    optimal = np.linalg.eigvalsh(rest)[:-6].sum()
    assert (np.trace(rest) - np.trace(captured @ rest @ captured.T)) / optimal - 1 < 0.02


def test_excess_error_with_a_mean_of_a_thousand():
    x = (spectrum_rows() + 1000).astype("float32")
    projector = fit_projector(x[:2000], RANK)
    wide, p = x.astype("float64"), projector.components.astype("float64")
    residual = ((wide - (wide @ p.T) @ p) ** 2).sum() / len(x)
    exact = residual / oracle.optimum(oracle.moment(wide), RANK) - 1
    assert excess_error(projector, x) == pytest.approx(exact, rel=1e-3, abs=1e-6)


def test_a_state_after_many_segments_still_ends_them():
    """Before lengths doubled, a state counted each segment of the last length."""
    learner = RandomizedSVD(RANK).update(spectrum_rows(rows=4000, features=64))
    state = learner.state_dict() | {"length": 78}
    restored = RandomizedSVD(RANK).load_state_dict(state)
    assert restored.update(spectrum_rows(rows=1000, features=64))._rows_left() < 10**8
