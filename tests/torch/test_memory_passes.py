"""Learning in turns, under a budget of memory."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ipa_core import ExactCovariance, IncrementalPCA, RandomizedSVD
from ipa_core.errors import EmptyStreamError, RankError, SettingError, StreamError
from ipa_torch import StoppingCriteria, fit_projectors, learner_bytes
from ipa_torch._fit.memory import measure_learner_bytes

from .models import Transformer, decaying

LEARNERS = [RandomizedSVD, IncrementalPCA, ExactCovariance]


def tokens(count=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, (6, 9), generator=generator) for _ in range(count)]


def learned(model, batches, **options):
    return fit_projectors(model, batches, 2, progress=False, **options)


def one(learner, features):
    return measure_learner_bytes(learner, 2, features, False)


@pytest.mark.parametrize("learner", LEARNERS)
def test_equals_learning_at_one_go(learner):
    model = Transformer()
    expected = learned(model, tokens(), learner=learner)
    found = learned(model, tokens(), learner=learner, max_bytes=one(learner, 24))
    assert found.passes > 2 and expected.passes == 1
    assert list(found) == list(expected)
    assert found.shared == expected.shared
    for name, projector in expected.items():
        assert torch.equal(found[name].components, projector.components)
        assert torch.equal(found[name].energies, projector.energies)


def test_shared_inputs_stay_together_and_count_once():
    model = Transformer(blocks=1)
    # q, k and v share; out, up and down have inputs of their own: four learners.
    whole = 3 * one(RandomizedSVD, 12) + one(RandomizedSVD, 24)
    assert learned(model, tokens(), max_bytes=whole).passes == 1
    assert learned(model, tokens(), max_bytes=whole - 1).passes == 2
    narrow, wide = one(RandomizedSVD, 12), one(RandomizedSVD, 24)
    together = wide // narrow  # of the three of 12 features, in the place of the one of 24
    assert learned(model, tokens(), max_bytes=wide).passes == 1 + -(-3 // together)


@pytest.mark.parametrize("learner", LEARNERS)
def test_measured_bytes_bound_what_is_held(learner):
    probe, rows = learner(4), decaying(3000, 40)
    for batch in rows.split(100):
        probe.update(batch)
        arrays = probe.state_dict().values()
        held = sum(x.nbytes for x in arrays if isinstance(x, torch.Tensor))
        assert 2 * held <= 1.05 * measure_learner_bytes(learner, 4, 40, False)


def test_said_before_the_run_and_held_to():
    model, most = Transformer(blocks=1), []
    batches = [torch.randint(20, (64, 40)) for _ in range(6)]
    said = learner_bytes(model, batches[0], 2)
    assert list(said) == [
        ("attention.0.q", "attention.0.k", "attention.0.v"),
        ("attention.0.out",),
        ("up.0",),
        ("down.0",),
    ]

    def forward(model, batch):
        model(batch)
        held = [each.state_dict() for each in gc.get_objects() if type(each) is RandomizedSVD]
        arrays = [x for state in held for x in state.values() if isinstance(x, torch.Tensor)]
        most.append(sum({x.data_ptr(): x.nbytes for x in arrays}.values()))

    gc.collect()
    whole = sum(said.values())
    assert learned(model, batches, forward=forward, max_bytes=whole).passes == 1
    assert learned(model, batches, max_bytes=whole - 1).passes == 2
    assert 0.2 * whole < max(most) <= whole


def test_shuffled_loaders_give_every_pass_the_same_order():
    model, rows = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)), decaying(400, 12)
    found = []
    for budget in (None, one(RandomizedSVD, 12)):
        torch.manual_seed(3)
        loader = DataLoader(rows, batch_size=32, shuffle=True)
        found.append(learned(model, loader, stop=StoppingCriteria(max_batches=4), max_bytes=budget))
    assert found[1].passes == 2
    for name, projector in found[0].items():
        assert torch.equal(found[1][name].components, projector.components)


def test_with_a_tolerance_each_layer_stops_as_it_would():
    model, batches = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)), decaying(9000, 12).split(300)
    whole = learned(model, batches, stop=StoppingCriteria(tolerance=0.1))
    budget = measure_learner_bytes(RandomizedSVD, 2, 12, True)
    turns = learned(model, batches, stop=StoppingCriteria(tolerance=0.1), max_bytes=budget)
    assert turns.passes == 2
    assert turns.stopped == whole.stopped


class Forked(nn.Module):
    """The first batch reaches one layer, later ones the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x, second):
        return (self.second if second else self.first)(x)


def test_layers_that_the_first_batch_does_not_reach():
    batches = [(rows, number > 1) for number, rows in enumerate(decaying(100, 12).split(20))]
    expected = learned(Forked(), batches)
    found = learned(Forked(), batches, max_bytes=one(RandomizedSVD, 12))
    assert found.passes == 2
    for name, projector in expected.items():
        assert torch.equal(found[name].components, projector.components)


def test_layers_that_never_run_are_reported_once():
    batches = [(rows, False) for rows in decaying(100, 12).split(20)]
    with pytest.warns(UserWarning, match="'second': its forward never ran"):
        found = learned(Forked(), batches, max_bytes=one(RandomizedSVD, 12))
    assert list(found) == ["first"]


def test_what_was_learned_before_an_interruption_is_returned():
    model, batches, runs = Transformer(blocks=1), tokens(), []

    def forward(model, batch):
        runs.append(batch)
        if len(runs) > 1 + len(batches) + 2:  # looked at once, read once, and begun again
            raise KeyboardInterrupt
        model(batch)

    options = {
        "max_bytes": one(RandomizedSVD, 24),
        "forward": forward,
        "stop": StoppingCriteria(on_error="return"),
    }
    with pytest.warns(UserWarning) as told:
        found = learned(model, batches, **options)
    assert any("before its turn" in str(warning.message) for warning in told)
    expected = learned(model, batches)
    assert list(found)[:4] == list(expected)[:4] and "down.0" in found.missing
    assert torch.equal(found["attention.0.q"].components, expected["attention.0.q"].components)


def test_nothing_is_left_behind():
    model = Transformer()
    state = torch.get_rng_state()
    learned(model, tokens(), max_bytes=one(RandomizedSVD, 24))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_refused():
    model = Transformer()
    with pytest.raises(
        SettingError, match=r"layer 'attention.0.q': expected max_bytes of at least"
    ):
        learned(model, tokens(), max_bytes=1000)
    with pytest.raises(SettingError, match="max_bytes above 0"):
        learned(model, tokens(), max_bytes=0)
    with pytest.raises(StreamError, match="one-shot list_iterator"):
        learned(model, iter(tokens()), max_bytes=10**9)
    with pytest.raises(EmptyStreamError, match="at least one batch"):
        learned(model, [], max_bytes=10**9)
    with pytest.raises(RankError, match="layer 'attention.0.q'"):
        fit_projectors(model, tokens(), 13, max_bytes=10**9, progress=False)
