"""Memory passes, and the measured memory of learners."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ipa_core import ExactCovariance, IncrementalPCA, RandomizedSVD
from ipa_core.errors import EmptyStreamError, RankError, SettingError, StreamError
from ipa_torch import StoppingCriteria, fit_projectors, learner_bytes
from ipa_torch._fit.learner_bytes import measure_learner_bytes

from .models import Transformer, decaying

LEARNERS = [RandomizedSVD, IncrementalPCA, ExactCovariance]


def tokens(count=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, (6, 9), generator=generator) for _ in range(count)]


def fit(model, batches, **options):
    return fit_projectors(model, batches, 2, progress=False, **options)


def bytes_of(learner, features):
    return measure_learner_bytes(learner, 2, features, False)


@pytest.mark.parametrize("learner", LEARNERS)
def test_equals_a_single_pass(learner):
    model = Transformer()
    expected = fit(model, tokens(), learner=learner)
    projectors = fit(model, tokens(), learner=learner, max_bytes=bytes_of(learner, 24))
    assert projectors.passes > 2 and expected.passes == 1
    assert list(projectors) == list(expected)
    assert projectors.shared == expected.shared
    for name, projector in expected.items():
        assert torch.equal(projectors[name].components, projector.components)
        assert torch.equal(projectors[name].energies, projector.energies)


def test_shared_inputs_stay_together_and_count_once():
    model = Transformer(blocks=1)
    # q, k and v share an input; out, up and down do not: four learners.
    whole = 3 * bytes_of(RandomizedSVD, 12) + bytes_of(RandomizedSVD, 24)
    assert fit(model, tokens(), max_bytes=whole).passes == 1
    assert fit(model, tokens(), max_bytes=whole - 1).passes == 2
    narrow, wide = bytes_of(RandomizedSVD, 12), bytes_of(RandomizedSVD, 24)
    together = wide // narrow  # learners of 12 features in the memory of one of 24
    assert fit(model, tokens(), max_bytes=wide).passes == 1 + -(-3 // together)


@pytest.mark.parametrize("learner", LEARNERS)
def test_measured_bytes_bound_the_state(learner):
    fitted, rows = learner(4), decaying(3000, 40)
    for batch in rows.split(100):
        fitted.update(batch)
        arrays = fitted.state_dict().values()
        held = sum(x.nbytes for x in arrays if isinstance(x, torch.Tensor))
        assert 2 * held <= 1.05 * measure_learner_bytes(learner, 4, 40, False)


def test_learner_bytes_bound_the_fit():
    model, measured = Transformer(blocks=1), []
    batches = [torch.randint(20, (64, 40)) for _ in range(6)]
    sizes = learner_bytes(model, batches[0], 2)
    assert list(sizes) == [
        ("attention.0.q", "attention.0.k", "attention.0.v"),
        ("attention.0.out",),
        ("up.0",),
        ("down.0",),
    ]

    def forward(model, batch):
        model(batch)
        held = [each.state_dict() for each in gc.get_objects() if type(each) is RandomizedSVD]
        arrays = [x for state in held for x in state.values() if isinstance(x, torch.Tensor)]
        measured.append(sum({x.data_ptr(): x.nbytes for x in arrays}.values()))

    gc.collect()
    whole = sum(sizes.values())
    assert fit(model, batches, forward=forward, max_bytes=whole).passes == 1
    assert fit(model, batches, max_bytes=whole - 1).passes == 2
    assert 0.2 * whole < max(measured) <= whole


def test_shuffled_loaders_give_every_pass_the_same_order():
    model, rows = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)), decaying(400, 12)
    projectors = []
    for budget in (None, bytes_of(RandomizedSVD, 12)):
        torch.manual_seed(3)
        loader = DataLoader(rows, batch_size=32, shuffle=True)
        projectors.append(
            fit(model, loader, stop=StoppingCriteria(max_batches=4), max_bytes=budget)
        )
    assert projectors[1].passes == 2
    for name, projector in projectors[0].items():
        assert torch.equal(projectors[1][name].components, projector.components)


def test_with_a_tolerance_each_layer_stops_as_it_would():
    model, batches = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)), decaying(9000, 12).split(300)
    whole = fit(model, batches, stop=StoppingCriteria(tolerance=0.1))
    budget = measure_learner_bytes(RandomizedSVD, 2, 12, True)
    in_passes = fit(model, batches, stop=StoppingCriteria(tolerance=0.1), max_bytes=budget)
    assert in_passes.passes == 2
    assert in_passes.stopped == whole.stopped


class Forked(nn.Module):
    """The first batch reaches one layer, later ones the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x, second):
        return (self.second if second else self.first)(x)


def test_layers_that_the_first_batch_does_not_reach():
    batches = [(rows, number > 1) for number, rows in enumerate(decaying(100, 12).split(20))]
    expected = fit(Forked(), batches)
    projectors = fit(Forked(), batches, max_bytes=bytes_of(RandomizedSVD, 12))
    assert projectors.passes == 2
    for name, projector in expected.items():
        assert torch.equal(projectors[name].components, projector.components)


def test_layers_that_never_run_are_reported_once():
    batches = [(rows, False) for rows in decaying(100, 12).split(20)]
    with pytest.warns(UserWarning, match="'second': its forward never ran"):
        projectors = fit(Forked(), batches, max_bytes=bytes_of(RandomizedSVD, 12))
    assert list(projectors) == ["first"]


def test_projectors_before_an_interruption_are_returned():
    model, batches, runs = Transformer(blocks=1), tokens(), []

    def forward(model, batch):
        runs.append(batch)
        if len(runs) > 1 + len(batches) + 2:  # a probe, a pass, and two batches of the next
            raise KeyboardInterrupt
        model(batch)

    options = {
        "max_bytes": bytes_of(RandomizedSVD, 24),
        "forward": forward,
        "stop": StoppingCriteria(on_error="return"),
    }
    with pytest.warns(UserWarning) as warned:
        projectors = fit(model, batches, **options)
    assert any("learning ended before its pass" in str(warning.message) for warning in warned)
    expected = fit(model, batches)
    assert list(projectors)[:4] == list(expected)[:4] and "down.0" in projectors.missing
    assert torch.equal(projectors["attention.0.q"].components, expected["attention.0.q"].components)


def test_hooks_and_random_state_are_restored():
    model = Transformer()
    state = torch.get_rng_state()
    fit(model, tokens(), max_bytes=bytes_of(RandomizedSVD, 24))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_refused():
    model = Transformer()
    with pytest.raises(
        SettingError, match=r"layer 'attention.0.q': expected max_bytes of at least"
    ):
        fit(model, tokens(), max_bytes=1000)
    with pytest.raises(SettingError, match="max_bytes to be above 0"):
        fit(model, tokens(), max_bytes=0)
    with pytest.raises(StreamError, match="one-shot list_iterator"):
        fit(model, iter(tokens()), max_bytes=10**9)
    with pytest.raises(EmptyStreamError, match="at least one batch"):
        fit(model, [], max_bytes=10**9)
    with pytest.raises(RankError, match="layer 'attention.0.q'"):
        fit_projectors(model, tokens(), 13, max_bytes=10**9, progress=False)
