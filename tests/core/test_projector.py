"""`Projector` as a value, and its metrics."""

import dataclasses

import numpy as np
import pytest

from ipa_core import (
    EmptyStreamError,
    ExactCovariance,
    Projector,
    RankError,
    ShapeError,
    allocate_ranks,
    effective_rank,
    excess_error,
    fit_projector,
    principal_angles,
    rank_for_energy,
)
from ipa_core._array import as_namespace
from tests.core import oracle

X = np.random.default_rng(0).standard_normal((400, 9)) * np.arange(9, 0, -1.0) + 1.0


def fitted(xp, rank=4, **settings):
    return ExactCovariance(rank, **settings).update(xp.asarray(X)).finalize()


@pytest.mark.parametrize("center", [False, True])
def test_reconstruction(xp, center):
    projector = fitted(xp, center=center)
    x = xp.asarray(X)
    again = projector.reconstruct(projector.project(x))
    error = ((X - oracle.host(again)) ** 2).sum(axis=1).mean()
    assert projector.reconstruction_error(x) == pytest.approx(error)
    c = oracle.moment(X, center=center)
    assert error == pytest.approx(oracle.optimum(c, 4))
    assert projector.captured() == pytest.approx(1 - error / np.trace(c))


def test_weighted_reconstruction_error(xp):
    projector = fitted(xp)
    weights = np.arange(400.0) % 3
    repeated = xp.asarray(np.repeat(X, weights.astype(int), axis=0))
    weighted = projector.reconstruction_error(xp.asarray(X), xp.asarray(weights))
    assert weighted == pytest.approx(projector.reconstruction_error(repeated))
    with pytest.raises(ShapeError, match=r"weights of shape \(400,\)"):
        projector.reconstruction_error(xp.asarray(X), xp.asarray(weights[:3]))


def test_leading_shapes(xp):
    projector = fitted(xp)
    x = xp.asarray(X[:12].reshape(3, 4, 9))
    assert projector.project(x).shape == (3, 4, 4)
    assert projector.reconstruct(projector.project(x)).shape == (3, 4, 9)
    with pytest.raises(ShapeError, match=r"\(..., 9\), got \(3, 4, 4\)"):
        projector.project(projector.project(x))
    with pytest.raises(ShapeError, match=r"\(..., 4\), got"):
        projector.reconstruct(x)


def test_truncate_is_the_projector_of_the_smaller_rank(xp):
    small, direct = fitted(xp, 6).truncate(2), fitted(xp, 2)
    assert float(xp.max(principal_angles(small, direct))) < 1e-7
    assert small.captured() == pytest.approx(direct.captured())
    assert fitted(xp, 6).captured(2) == pytest.approx(direct.captured())
    for rank in (0, 7):
        with pytest.raises(RankError, match="between 1 and 6"):
            fitted(xp, 6).truncate(rank)


def test_to_another_library():
    torch = pytest.importorskip("torch")
    projector = fitted(np)
    there = projector.to(torch, dtype=torch.float32)
    assert there.components.dtype == torch.float32
    back = there.to(np)
    assert np.allclose(back.components, projector.components, atol=1e-6)
    assert back.samples == projector.samples
    assert as_namespace(torch).__name__ == "array_api_compat.torch"


def test_is_a_value():
    projector = fitted(np)
    with pytest.raises(dataclasses.FrozenInstanceError):
        projector.samples = 3
    assert repr(projector) == (
        f"Projector(rank=4, features=9, captured={projector.captured():.3f}, samples=400, "
        "numpy float64 on cpu)"
    )


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.5, np.pi / 2])
def test_principal_angles(xp, angle):
    first = np.eye(2, 5)
    second = first.copy()
    second[1] = np.cos(angle) * first[1] + np.sin(angle) * np.eye(5)[3]
    angles = principal_angles(plain(xp, first), plain(xp, second))
    assert oracle.host(angles) == pytest.approx([0.0, angle], abs=1e-15, rel=1e-6)
    assert oracle.host(principal_angles(plain(xp, second[1:]), plain(xp, first))) == pytest.approx(
        [angle], abs=1e-15, rel=1e-6
    )


def plain(xp, components):
    rank, features = components.shape
    return Projector(xp.asarray(components), xp.zeros(features), xp.ones(rank), 9.0, 1)


def test_principal_angles_need_equal_features():
    with pytest.raises(ShapeError, match="equal features, got 5 and 4"):
        principal_angles(plain(np, np.eye(2, 5)), plain(np, np.eye(2, 4)))


def test_excess_error(xp):
    projector = fit_projector(xp.asarray(X[:50]), 3)
    held_out = xp.asarray(X[50:])
    expected = oracle.excess(oracle.moment(X[50:]), projector.components)
    assert excess_error(projector, held_out) == pytest.approx(expected)
    assert excess_error(fit_projector(held_out, 3, learner=ExactCovariance), held_out) == (
        pytest.approx(0.0, abs=1e-10)
    )
    assert excess_error(plain(xp, np.eye(9)[:1]), xp.asarray(np.eye(9)[1:2])) == np.inf
    with pytest.raises(EmptyStreamError, match="keeps some rows"):
        excess_error(projector, [])


def test_effective_rank_and_rank_for(xp):
    spread = fitted(xp, 9)
    energies = oracle.host(spread.energies)
    assert effective_rank(spread) == pytest.approx(energies.sum() ** 2 / (energies**2).sum())
    shares = energies.cumsum() / energies.sum()
    for share in (0.1, 0.5, 0.9, 0.99):
        assert rank_for_energy(spread, share) == int(np.searchsorted(shares, share)) + 1
    with pytest.raises(RankError, match="a projector of a larger rank"):
        rank_for_energy(fitted(xp, 2), 0.999)
    for share in (0.0, 1.1, -1.0):
        with pytest.raises(RankError, match="between 0 and 1"):
            rank_for_energy(spread, share)


def test_allocate_ranks_is_optimal():
    rng = np.random.default_rng(0)
    spectra = {name: np.sort(rng.random(6))[::-1] for name in "abc"}
    ranks = allocate_ranks(spectra, 9, floor=1, cap=5)
    assert sum(ranks.values()) == 9
    assert all(1 <= rank <= 5 for rank in ranks.values())

    def captured(allocation):
        return sum(spectra[name][:rank].sum() for name, rank in allocation.items())

    best = max(
        captured(dict(zip("abc", (i, j, 9 - i - j), strict=True)))
        for i in range(1, 6)
        for j in range(1, 6)
        if 1 <= 9 - i - j <= 5
    )
    assert captured(ranks) == pytest.approx(best)


@pytest.mark.parametrize("budget", [1, 100])
def test_allocate_ranks_refuses_what_cannot_be(budget):
    with pytest.raises(RankError, match="between 2 and 5"):
        allocate_ranks({"a": [3, 2, 1], "b": [2, 1]}, budget)
