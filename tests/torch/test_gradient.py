import copy
from functools import partial

import pytest
import torch
from torch import nn

from ipa_core import ExactCovariance, RandomizedSVD
from ipa_core.errors import EmptyStreamError, NonFiniteError, RankError, SettingError
from ipa_torch import (
    DampedGradientSketch,
    GradientSketch,
    GradientWeightedInputs,
    LayerError,
    attach,
    fit_gradient_projectors,
)

from .models import Convolutions, Tied, Transformer, decaying, mlp


def squares(model, batch):
    return (model(batch) - 1).square().sum()


def gradient_of(model, name, batches, loss=squares):
    model.zero_grad()
    model.eval()
    for batch in batches:
        loss(model, batch).backward()
    gradient = model.get_submodule(name).weight.grad.clone()
    model.zero_grad(set_to_none=True)
    return gradient.flatten(1)


def share(components, gradient):
    """Energy of the gradient that P keeps, over the most that so many rows can keep."""
    kept = (gradient.double() @ components.double().T).square().sum()
    best = torch.linalg.svdvals(gradient.double())[: len(components)].square().sum()
    return float(kept / best)


@pytest.mark.parametrize(
    ("make", "batches", "names"),
    [
        (lambda: mlp(12, 16, 4), lambda: decaying(200, 12).split(50), ["0", "2"]),
        (Transformer, lambda: [torch.randint(0, 20, (4, 9)) for _ in range(3)], ["up.0", "down.1"]),
        (
            Convolutions,
            lambda: [torch.randn(2, 3, 9, 8) for _ in range(3)],
            ["strided", "grouped", "reflected", "line"],
        ),
        (Tied, lambda: [torch.randint(0, 10, (4, 5)) for _ in range(3)], ["hidden"]),
    ],
)
def test_keeps_the_weights_gradient(make, batches, names):
    model, batches = make(), batches()
    projectors = fit_gradient_projectors(
        model, batches, 3, targets=names, loss=squares, max_patches=None
    )
    for name in names:
        assert share(projectors[name].components, gradient_of(model, name, batches)) > 0.9, name


def damped(gradient, x):
    moment = x.double().T @ x.double() / len(x)
    unit = torch.eye(len(moment), dtype=torch.float64) * moment.trace() / len(moment)
    return gradient.double() @ torch.linalg.inv(moment + unit)


@pytest.mark.parametrize(("features", "learner"), [(12, ExactCovariance), (80, RandomizedSVD)])
def test_keeps_the_damped_gradient(features, learner):
    x, wish = torch.randn(2000, features), torch.randn(features, 16)
    # Large inputs of which the loss wants little: enough for the gradient to lean to them.
    x[:, : features // 12] *= 30
    wish *= 0.5 ** torch.arange(16)
    wish[: features // 12] *= 0.01

    def loss(model, batch):
        return (model(batch) * (batch @ wish)).sum()

    model = nn.Sequential(nn.Linear(features, 16))
    fit = partial(fit_gradient_projectors, model, x.split(100), 3, loss=loss)
    wanted = damped(gradient_of(model, "0", x.split(100), loss), x)
    assert (
        share(fit(learner=partial(DampedGradientSketch, learner=learner))["0"].components, wanted)
        > 0.98
    )
    assert share(fit()["0"].components, wanted) < 0.95


@pytest.mark.parametrize("outputs", [1, 16])
def test_half_of_the_rank_may_be_inputs(outputs):
    x = decaying(500, 40)
    model = nn.Sequential(nn.Linear(40, outputs))
    damped = partial(DampedGradientSketch, learner=ExactCovariance)
    fit = partial(fit_gradient_projectors, model, [x], loss=squares)
    components = fit(rank=5, learner=partial(damped, input_share=0.5))["0"].components.double()
    inputs = torch.linalg.svd(x.double(), full_matrices=False).Vh[:2]
    gradient = fit(rank=1, learner=damped)["0"].components.double()
    torch.testing.assert_close(components @ components.T, torch.eye(5).double(), atol=1e-6, rtol=0)
    for wanted in (inputs, gradient):
        assert torch.linalg.svdvals(wanted @ components.T).min() > 0.999


def test_input_share_is_in_the_state_and_equal_in_what_merges():
    x, g = decaying(60, 12)[:, None], torch.randn(60, 1, 40)
    mixed = DampedGradientSketch(3, input_share=0.6)
    mixed.update(x, g)
    again = DampedGradientSketch(3).load_state_dict(mixed.state_dict())
    assert mixed.fixed_rows == again.fixed_rows == 2
    torch.testing.assert_close(again.finalize().components, mixed.finalize().components)
    with pytest.raises(SettingError, match="equal input_share to merge, got 0.6 and 0.0"):
        mixed.merge(DampedGradientSketch(3))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_input_share_is_between_zero_and_one(share):
    with pytest.raises(SettingError, match="input_share to be from 0 to 1"):
        DampedGradientSketch(3, input_share=share)


def test_weighted_inputs_merge_and_keep_their_state():
    x, g = decaying(60, 12)[:, None], torch.randn(60, 1, 4)
    make = partial(GradientWeightedInputs, 3, learner=ExactCovariance)
    whole, first, second = make(), make(), make()
    whole.update(x, g), first.update(x[:25], g[:25]), second.update(x[25:], g[25:])
    state = second.state_dict()
    again = copy.copy(first)
    again.load_state_dict(state)
    assert first.samples == 25 and again.samples == 35
    for both in (first.merge(second), first.compact().merge(again)):
        assert (both.rank, both.samples) == (3, 60)
        torch.testing.assert_close(
            torch.linalg.svdvals(both.finalize().components @ whole.finalize().components.T),
            torch.ones(3),
        )


def test_damping_leaves_out_rows_without_gradient():
    x, g = decaying(60, 12)[:, None], torch.randn(60, 1, 40)
    padded, bare = DampedGradientSketch(3), DampedGradientSketch(3)
    padded.update(torch.cat([x, 1e3 * torch.randn(20, 1, 12)]), torch.cat([g, 0 * g[:20]]))
    bare.update(x, g)
    torch.testing.assert_close(padded.finalize().components, bare.finalize().components)


def test_a_batch_that_is_refused_changes_nothing():
    x, g = decaying(60, 12)[:, None], torch.randn(60, 1, 40)
    sketch, bad = DampedGradientSketch(3), g.clone()
    sketch.update(x, g)
    bad[7, 0, 3] = float("nan")
    before = sketch.finalize().components
    for refused in ((x, bad), (x / 0, g)):
        with pytest.raises(NonFiniteError):
            sketch.update(*refused)
    assert sketch.samples == 60 and torch.equal(sketch.finalize().components, before)


@pytest.mark.parametrize("kind", [GradientSketch, DampedGradientSketch])
def test_merges_and_needs_equal_seeds(kind):
    x, g = torch.randn(60, 1, 12), torch.randn(60, 1, 40)
    whole, first, second = (kind(3) for _ in range(3))
    whole.update(x, g)
    first.update(x[:25], g[:25])
    second.update(x[25:], g[25:])
    again = kind(3).load_state_dict(second.state_dict())
    for both in (
        first.merge(second),
        first.merge(again).compact(),
        kind(3).merge(first).merge(second),
    ):
        assert both.samples == 60
        torch.testing.assert_close(
            torch.linalg.svdvals(both.finalize().components @ whole.finalize().components.T),
            torch.ones(3),
        )
    with pytest.raises(SettingError, match="equal seed"):
        first.merge(kind(3, seed=1))
    with pytest.raises(EmptyStreamError):
        kind(3).finalize()


@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_inputs_weighted_by_gradient_norm(size):
    x = decaying(100, 12)
    model = nn.Sequential(nn.Linear(12, 4))
    counts = torch.arange(100.0)[:, None] / 100

    def loss(model, batch):
        return (model(batch) * counts * size).sum()  # the gradient of row i has a norm of i / 50

    projector = fit_gradient_projectors(
        model, [x], 3, learner=partial(GradientWeightedInputs, learner=ExactCovariance), loss=loss
    )["0"]
    weighted = x * counts.sqrt()
    left = weighted - weighted @ projector.components.T @ projector.components
    best = torch.linalg.svdvals(weighted)[3:].square().sum()
    torch.testing.assert_close(left.square().sum(), best, rtol=1e-4, atol=0)


def test_no_trace_is_left():
    model = mlp(12, 8, 4).train()
    model[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    weights = [p.clone() for p in model.parameters()]
    projectors = fit_gradient_projectors(model, [decaying(20, 12)], 2, loss=squares)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert model.training and not any(m._forward_hooks for m in model.modules())
    attach(model, projectors)


def test_default_loss_is_the_models_own():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    batch = {"input_ids": torch.randint(0, 20, (4, 6)), "labels": torch.tensor([0, 1, 0, 1])}
    projectors = fit_gradient_projectors(model, [batch], 2)
    assert len(projectors) == 7
    with pytest.raises(LayerError, match="loss"):
        fit_gradient_projectors(model, [{"input_ids": batch["input_ids"]}], 2)


def test_layers_without_gradient_are_reported():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            self.idle(x)
            return self.used(x)

    projectors = fit_gradient_projectors(Idle(), [torch.randn(8, 6)], 2, loss=squares)
    assert list(projectors) == ["used"] and "idle" in projectors.missing
    with pytest.raises(LayerError, match="at least one layer"):
        fit_gradient_projectors(Idle(), [torch.randn(8, 6)], 2, targets=["idle"], loss=squares)
    with pytest.raises(EmptyStreamError):
        fit_gradient_projectors(Idle(), [], 2, loss=squares)
    with pytest.raises(RankError, match="layer 'used'"):
        fit_gradient_projectors(Idle(), [torch.randn(8, 6)], 7, loss=squares)
