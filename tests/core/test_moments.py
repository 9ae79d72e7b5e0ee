"""Moments, whitening and damped factors, on every array library."""

import numpy as np
import pytest

from ipa_core import (
    EmptyStreamError,
    ExactCovariance,
    NonFiniteError,
    RandomizedSVD,
    SettingError,
    ShapeError,
    damped_cholesky,
)
from ipa_core._array import to_numpy

RNG = np.random.default_rng(0)
X = RNG.standard_normal((500, 12)) @ RNG.standard_normal((12, 12)) + 3.0
WEIGHTS = RNG.integers(0, 4, 500).astype(float)


def learned(xp, center, rank=12, dtype="float64"):
    learner = ExactCovariance(rank, center=center)
    for part in np.split(np.arange(500), 7 * [0] + [100, 333]):
        x, w = (xp.asarray(a[part].astype(dtype)) for a in (X, WEIGHTS))
        learner.update(x, w)
    return learner


@pytest.mark.parametrize("center", [False, True])
def test_moment_and_mean_are_those_of_the_rows(xp, center):
    learner = learned(xp, center)
    mean = np.average(X, axis=0, weights=WEIGHTS) if center else np.zeros(12)
    expected = (
        np.cov(X.T, aweights=WEIGHTS, ddof=0) if center else (X.T * WEIGHTS) @ X / WEIGHTS.sum()
    )
    np.testing.assert_allclose(to_numpy(learner.moment), expected, rtol=1e-9)
    np.testing.assert_allclose(to_numpy(learner.mean), mean, rtol=1e-9)
    merged = learner.merge(learned(xp, center, rank=12))
    np.testing.assert_allclose(to_numpy(merged.moment), expected, rtol=1e-9)


def test_moments_need_rows():
    for name in ("moment", "mean"):
        with pytest.raises(EmptyStreamError, match=r"at least one row.*update\(\)"):
            getattr(ExactCovariance(1), name)


@pytest.mark.parametrize("zca", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_whitened_rows_are_white(xp, center, zca):
    projector = learned(xp, center).finalize()
    whitening = projector.whitening(zca=zca)
    x, kept = xp.asarray(X), WEIGHTS > 0
    z = to_numpy(whitening.whiten(x))
    moment = (z.T * WEIGHTS) @ z / WEIGHTS.sum()
    np.testing.assert_allclose(moment, np.eye(12), atol=1e-8)
    np.testing.assert_allclose(to_numpy(whitening.unwhiten(whitening.whiten(x)))[kept], X[kept])
    if zca:
        np.testing.assert_allclose(
            to_numpy(whitening.matrix), to_numpy(whitening.matrix).T, atol=1e-9
        )


@pytest.mark.parametrize("zca", [False, True])
def test_whitening_of_few_directions(zca):
    projector = learned(np, True, rank=5).finalize()
    whitening = projector.whitening(0.1, zca=zca)
    z = whitening.whiten(X)
    assert z.shape == (500, 12 if zca else 5)
    expected = projector.reconstruct(projector.project(X))
    np.testing.assert_allclose(whitening.unwhiten(z), expected, atol=1e-9)
    scales = projector.project(X) / np.sqrt(projector.energies + 0.1)
    np.testing.assert_allclose(z @ projector.components.T if zca else z, scales, atol=1e-9)


def test_whitening_refuses_what_has_no_scale():
    projector = RandomizedSVD(3).update(np.diag([1.0, 1.0, 0.0])).finalize()
    with pytest.raises(SettingError, match="truncate"):
        projector.whitening()
    assert np.isfinite(projector.whitening(1e-6).matrix).all()
    for eps in (-1.0, float("nan")):
        with pytest.raises(SettingError, match="eps"):
            projector.whitening(eps)
    with pytest.raises(ShapeError, match=r"\(\.\.\., 3\)"):
        projector.whitening(1.0).whiten(np.ones(4))


def test_damped_factor_solves_and_inverts(xp):
    moment = learned(xp, False).moment
    cholesky = damped_cholesky(moment, 0.05)
    damped = to_numpy(moment) + 0.05 * np.diag(to_numpy(moment)).mean() * np.eye(12)
    factor = to_numpy(cholesky.factor)
    assert cholesky.damping == 0.05 and not to_numpy(cholesky.dead).any()
    np.testing.assert_allclose(factor @ factor.T, damped, rtol=1e-9)
    assert (np.triu(factor, 1) == 0).all()
    np.testing.assert_allclose(to_numpy(cholesky.inverse()), np.linalg.inv(damped), rtol=1e-7)
    for right in (RNG.standard_normal(12), RNG.standard_normal((12, 3))):
        solution = to_numpy(cholesky.solve(xp.asarray(right)))
        np.testing.assert_allclose(solution, np.linalg.solve(damped, right), rtol=1e-7)


def test_dead_features_are_told_and_stay_zero(xp):
    x = X.copy()
    x[:, [2, 7]] = 0.0
    moment = ExactCovariance(1).update(xp.asarray(x)).moment
    cholesky = damped_cholesky(moment, 0.01)
    live = [i for i in range(12) if i not in (2, 7)]
    assert np.flatnonzero(to_numpy(cholesky.dead)).tolist() == [2, 7]
    part = to_numpy(moment)[np.ix_(live, live)]
    expected = np.linalg.inv(part + 0.01 * np.diag(part).mean() * np.eye(10))
    inverse = to_numpy(cholesky.inverse())
    np.testing.assert_allclose(inverse[np.ix_(live, live)], expected, rtol=1e-7)
    assert not inverse[[2, 7]].any() and not inverse[:, [2, 7]].any()
    assert not to_numpy(cholesky.solve(xp.asarray(X[:12])))[[2, 7]].any()


def test_damping_escalates_and_is_reported(xp):
    row = RNG.standard_normal(12)
    moment = np.outer(row, row)
    moment -= 1e-3 * np.eye(12) * moment.trace() / 12  # what rounding does to a singular one
    found = damped_cholesky(xp.asarray(moment), 1e-5)
    assert 1e-3 < found.damping <= 1.1e-2
    assert 1e-3 < damped_cholesky(xp.asarray(moment), 0.0).damping <= 1.1e-2
    with pytest.raises(SettingError, match=r"at most 0\.0001"):
        damped_cholesky(xp.asarray(moment), 1e-5, most_damping=1e-4)


def test_damping_refuses_what_is_no_moment():
    with pytest.raises(ShapeError, match="square"):
        damped_cholesky(np.ones((2, 3)))
    with pytest.raises(NonFiniteError, match="finite"):
        damped_cholesky(np.array([[1.0, np.nan], [np.nan, 1.0]]))
    for wrong in (-1.0, 2.0, float("nan")):
        with pytest.raises(SettingError, match="between 0 and"):
            damped_cholesky(np.eye(2), wrong)
    zeros = damped_cholesky(np.zeros((3, 3)))
    assert zeros.dead.all() and not zeros.inverse().any()
