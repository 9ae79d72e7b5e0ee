import dataclasses
import inspect

import pytest
import torch
from torch import nn

from ipa_core import ExactCovariance, IncrementalPCA
from ipa_core.errors import SettingError
from ipa_torch import FitOptions, StoppingCriteria, fit_projectors

from .models import decaying, excess, mlp


def fit(model, batches, rank=2, **options):
    return fit_projectors(model, batches, rank, progress=False, **options)


def endless(features=12, rows=64, seed=0):
    """Endless batches of a fixed distribution."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1 / torch.arange(1, features + 1)
    while True:
        yield torch.randn(rows, features, generator=generator) * scale


class TestBudget:
    def test_batches_are_not_drawn_beyond_it(self):
        batches = endless()
        projectors = fit(mlp(12, 4), batches, stop=StoppingCriteria(max_batches=3))
        assert projectors["0"].samples == 3 * 64
        assert projectors.stopped["0"] == "max_batches of 3 reached"
        next_one = next(batches)
        expected = endless()
        assert torch.equal(next_one, [next(expected) for _ in range(4)][3])

    def test_rows_of_each_layer(self):
        projectors = fit(mlp(12, 8, 4), endless(), stop=StoppingCriteria(max_rows=1000))
        assert projectors["2"].samples == 16 * 64
        assert projectors.stopped["2"] == "max_rows of 1,000 reached"

    def test_seconds(self):
        projectors = fit(mlp(12, 4), endless(), stop=StoppingCriteria(max_seconds=0.05))
        assert "max_seconds" in projectors.stopped["0"]

    def test_end_of_batches(self):
        assert fit(mlp(12, 4), [torch.randn(5, 12)]).stopped == {"0": "the batches ended"}

    @pytest.mark.parametrize("name", ["max_rows", "max_batches", "max_seconds"])
    def test_must_be_positive(self, name):
        with pytest.raises(SettingError, match=f"expected {name} to be above 0"):
            StoppingCriteria(**{name: 0})

    def test_criteria_are_a_value(self):
        stop = StoppingCriteria(max_rows=5, tolerance=0.1)
        assert stop == StoppingCriteria(5, tolerance=0.1)
        with pytest.raises(dataclasses.FrozenInstanceError):
            stop.max_rows = 6


def test_fit_options_are_the_parameters_that_a_bridge_passes_on():
    parameters = inspect.signature(fit_projectors).parameters
    assert len(parameters) <= 14
    not_passed_on = {"model", "batches", "rank", "targets", "on_missing"}
    assert set(FitOptions.__annotations__) == set(parameters) - not_passed_on


class TestConvergence:
    @pytest.mark.parametrize("learner", [ExactCovariance, IncrementalPCA])
    @pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
    def test_estimate_is_about_the_true_excess(self, learner, tolerance):
        projectors = fit(
            mlp(12, 4), endless(), 3, learner=learner, stop=StoppingCriteria(tolerance=tolerance)
        )
        assert "converged" in projectors.stopped["0"]
        stream = endless(seed=1)
        rows = torch.cat([next(stream) for _ in range(2000)])
        assert excess(projectors["0"], rows) < 2 * tolerance

    def test_stops_with_equal_energies(self):
        def white():
            generator = torch.Generator().manual_seed(0)
            while True:
                yield torch.randn(64, 12, generator=generator)

        projectors = fit(
            mlp(12, 4), white(), 3, stop=StoppingCriteria(tolerance=1e-2, max_batches=2000)
        )
        assert "converged" in projectors.stopped["0"]

    def test_does_not_stop_under_drift(self):
        def drifting():
            stream = endless()
            for step in range(200):
                angle = torch.tensor(1.0 + step).log()  # an equal rotation in each doubling
                rotated = torch.randn(64, 1) * 3 * torch.stack([angle.cos(), angle.sin()])
                yield next(stream) + nn.functional.pad(rotated, (4, 6))

        projectors = fit(mlp(12, 4), drifting(), 1, stop=StoppingCriteria(tolerance=1e-2))
        assert projectors.stopped["0"] == "the batches ended"

    def test_exactly_low_rank_rows_converge(self):
        rows = torch.randn(3, 12)
        batches = (torch.randn(32, 3) @ rows for _ in iter(int, 1))
        projectors = fit(
            mlp(12, 4), batches, 3, stop=StoppingCriteria(tolerance=1e-9, max_batches=500)
        )
        assert "converged" in projectors.stopped["0"]

    def test_a_converged_layer_is_no_longer_listened_to(self):
        model, hooks = mlp(12, 12, 4), []
        # The second layer sees noise that takes long; the first one three directions only.
        turn = torch.randn(3, 12)

        class Noisy(nn.Module):
            def __init__(self):
                super().__init__()
                self.easy, self.hard = model[0], model[2]

            def forward(self, x):
                hooks.append(len(self.easy._forward_pre_hooks))
                noise = torch.randn(64, 12) / torch.arange(1, 13) ** 0.1
                return self.easy(x[:, :3] @ turn).sum() + self.hard(noise).sum()

        projectors = fit(
            Noisy(), endless(), 3, stop=StoppingCriteria(tolerance=3e-3, max_batches=600)
        )
        assert hooks[0] == 1 and hooks[-1] == 0
        assert projectors["easy"].samples < projectors["hard"].samples

    def test_tolerance_must_be_positive(self):
        with pytest.raises(SettingError, match="tolerance to be above 0"):
            fit(mlp(12, 4), endless(), stop=StoppingCriteria(tolerance=0.0))


class Failing(nn.Module):
    def __init__(self, error, at):
        super().__init__()
        self.layers, self.error, self.at, self.calls = mlp(12, 8, 4), error, at, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.layers(x)


class TestInterruption:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
    def test_what_was_learned_is_returned_if_asked(self, error):
        model = Failing(error, 4).train()
        with pytest.warns(UserWarning, match="learning ended early"):
            projectors = fit(
                model, [decaying(20, 12)] * 6, stop=StoppingCriteria(on_error="return")
            )
        assert projectors["layers.0"].samples == 60
        assert type(error).__name__ in projectors.stopped["layers.0"]
        assert model.training and not model.layers[0]._forward_pre_hooks

    def test_raised_by_default_and_when_nothing_was_learned(self):
        with pytest.raises(KeyboardInterrupt):
            fit(Failing(KeyboardInterrupt(), 4), [decaying(20, 12)] * 6)
        with pytest.raises(RuntimeError, match="broken"):
            fit(
                Failing(RuntimeError("broken"), 1),
                [decaying(20, 12)] * 6,
                stop=StoppingCriteria(on_error="return"),
            )

    def test_layer_with_nan_is_left_out_and_the_others_go_on(self):
        model = mlp(12, 8, 4)
        model[0].weight.data[0, 0] = float("nan")
        with pytest.warns(UserWarning, match="'2'.*expected finite values"):
            projectors = fit(
                model, [decaying(20, 12)] * 3, stop=StoppingCriteria(on_error="return")
            )
        assert projectors["0"].samples == 60
        assert "finite" in projectors.missing["2"]

    def test_choices_are_checked(self):
        with pytest.raises(SettingError, match="on_error to be 'raise' or 'return'"):
            fit(mlp(12, 4), endless(), stop=StoppingCriteria(on_error="ignore"))
