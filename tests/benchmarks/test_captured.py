"""Rows of A from captured inputs and gradients, by the laws that define them."""

import pytest
import torch

from benchmarks.evidence import captured
from benchmarks.evidence.captured import Captured


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) * torch.arange(1, 13)
    first = torch.arange(200) % 10 == 0
    x[first] = 0
    x[first, 0] = 1000.0
    g = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    return Captured(x, g, first)


def test_first_token_left_out(rows):
    sink = torch.eye(12, dtype=torch.float64)[0]
    assert captured.inputs(rows, 3)[0][0] @ sink == pytest.approx(1, abs=1e-6) or (
        captured.inputs(rows, 3)[0][0] @ sink == pytest.approx(-1, abs=1e-6)
    )
    left, _ = captured.inputs(rows, 3, weighting=captured.without_first)
    assert (left @ sink).abs().max() < 0.2


def test_weights_that_tame_sinks(rows):
    energies = rows.x.square().sum(1)
    unit = captured.unit(rows)
    torch.testing.assert_close(unit * energies, torch.ones_like(energies))
    capped = captured.capped(rows)
    assert float((capped * energies).max()) <= captured.CAP * float(energies.median()) * (1 + 1e-9)
    assert (capped[energies < captured.CAP * energies.median()] == 1).all()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_rows_sized_by_a_power_of_their_energy(power, rows):
    a, weights = captured.inputs(rows, 4, weighting=captured.without_first, power=power)
    energies = weights @ (rows.x @ a.T).square() / weights.sum()
    lengths = a.square().sum(1)
    directions = a / lengths.sqrt()[:, None]
    plain = weights @ (rows.x @ directions.T).square() / weights.sum()
    torch.testing.assert_close(energies / energies[0], (plain / plain[0]) ** (1 - power))
    torch.testing.assert_close(directions @ directions.T, torch.eye(4, dtype=a.dtype))


def test_scaled_rows_have_the_energy_of_random_ones(rows):
    a, weights = captured.inputs(rows, 4, weighting=captured.without_first, power=0.5)
    a = captured.scaled(a, rows, weights)
    kept, total = (weights @ z.square().sum(1) for z in (rows.x @ a.T, rows.x))
    assert float(kept / total) == pytest.approx(4 / (3 * 12))


def test_standardized_rows_see_each_coordinate_alike(rows):
    """Other units of the coordinates do not change A x."""
    other = Captured(rows.x * torch.arange(12, 0, -1), rows.g, rows.first)
    first, second = (given.x @ captured.standardized(given, 3)[0].T for given in (rows, other))
    torch.testing.assert_close(first @ first.T, second @ second.T)


def test_column_gradient_sees_each_coordinate_alike(rows):
    other = Captured(rows.x * torch.arange(12, 0, -1), rows.g, rows.first)
    first, second = (captured.column_gradient(given, 2)[0] for given in (rows, other))
    torch.testing.assert_close(first.T @ first, second.T @ second)


def test_fisher_rows_gain_most_in_one_step(rows):
    """Of the damped quadratic model of the loss, no other span of that rank takes off more."""
    a, weights = captured.fisher(rows, 2)

    def damped_moment(z):
        c = z.T @ (weights[:, None] * z) / weights.sum()
        return c + c.trace() / len(c) * torch.eye(len(c), dtype=c.dtype)

    c, s = damped_moment(rows.x), damped_moment(rows.g)
    g = rows.g.T @ (weights[:, None] * rows.x)

    def gain(a):
        inner = torch.linalg.inv(a @ c @ a.T)
        return float(torch.trace(torch.linalg.inv(s) @ g @ a.T @ inner @ a @ g.T))

    generator = torch.Generator().manual_seed(1)
    best = gain(a)
    for _ in range(50):
        nudge = 0.1 * a.norm() * torch.randn(a.shape, generator=generator, dtype=a.dtype)
        assert gain(a + nudge) < best
    columns = (torch.linalg.inv(s) @ g @ a.T @ torch.linalg.inv(a @ c @ a.T)).square()
    root = torch.linalg.cholesky(s).T
    lengths = (root @ torch.linalg.inv(s) @ g @ a.T @ torch.linalg.inv(a @ c @ a.T)).norm(dim=0)
    assert columns.isfinite().all()
    torch.testing.assert_close(lengths[0], lengths[1])


def test_without_gradients_none_can_be_used(rows):
    with pytest.raises(ValueError, match="expected gradients of the outputs, got none"):
        captured.fisher(Captured(rows.x, None, rows.first), 2)
