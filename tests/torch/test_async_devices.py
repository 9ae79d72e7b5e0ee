"""Asynchronous devices, with a CPU in their place."""

import contextlib

import pytest
import torch
from torch import nn

from ipa_core import IncrementalPCA, RandomizedSVD
from ipa_core._array import transfer
from ipa_core.errors import NonFiniteError
from ipa_torch import StoppingCriteria, fit_projectors
from ipa_torch._capture import async_update
from ipa_torch._fit.shared_inputs import MOST_PENDING
from ipa_torch._layers import async_device

from .models import Transformer, decaying

RETURN = StoppingCriteria(on_error="return")


@pytest.fixture
def asynchronous(monkeypatch):
    monkeypatch.setattr(async_device, "is_async_device", lambda device: True)


class Lambda(nn.Module):
    """A function of a tensor as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def fit(model, batches, **options):
    return fit_projectors(model, batches, 3, progress=False, **options)


def assert_equal(synchronous, delayed):
    assert synchronous.keys() == delayed.keys()
    for name, projector in synchronous.items():
        assert torch.equal(projector.components, delayed[name].components)
        assert projector.samples == delayed[name].samples


@pytest.mark.parametrize("learner", [IncrementalPCA, RandomizedSVD])
def test_the_same_projectors_to_the_bit(monkeypatch, learner):
    model = Transformer(width=48)
    mask = torch.arange(40) < torch.randint(1, 40, (16, 1))
    ids = torch.randint(0, 20, (3, 16, 40))
    batches = [{"input_ids": x, "attention_mask": m} for m in (None, mask) for x in ids]
    synchronous = fit(model, batches, learner=learner)
    monkeypatch.setattr(async_device, "is_async_device", lambda device: True)
    delayed = fit(model, batches, learner=learner)
    assert_equal(synchronous, delayed)


def test_the_layer_computes_before_the_host_waits(asynchronous, monkeypatch):
    events = []
    on_host = transfer.on_host

    def read(array):
        events.append("read")
        return on_host(array)

    class Watched(nn.Linear):
        def forward(self, x):
            events.append("computed")
            return super().forward(x)

    monkeypatch.setattr(transfer, "on_host", read)
    fit(nn.Sequential(Watched(64, 4)), decaying(600, 64).split(200))
    before_probe, *by_batch = " ".join(events).split("computed")  # the layer is probed first
    assert len(by_batch) == 4
    assert not before_probe and not by_batch[0].strip()
    assert all(set(part.split()) == {"read"} for part in by_batch[1:])


def test_an_invalid_input_is_named_and_drops_only_its_layers(asynchronous):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(12, 12) for _ in range(3))

        def forward(self, x):
            self.first(x)
            x = x / 0
            return self.second(x), self.third(x)

    batches = [decaying(60, 12)]  # a single batch, so that each layer begins its own update
    with pytest.raises(NonFiniteError, match="layer 'second'"):
        fit(Broken(), batches)
    with pytest.warns(UserWarning, match="got none for 2"):
        projectors = fit(Broken(), batches, stop=RETURN)
    assert list(projectors) == ["first"]
    assert projectors["first"].samples == 60
    assert all("finite" in projectors.missing[name] for name in ("second", "third"))


def test_a_forward_that_fails_leaves_no_hook(asynchronous):
    class Failing(nn.Linear):
        def forward(self, x):
            raise RuntimeError("broken")

    model = nn.Sequential(nn.Linear(12, 12), Failing(12, 4))
    with pytest.raises(RuntimeError, match="broken"):
        fit(model, [decaying(20, 12)])
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model)


def test_a_dropped_layer_that_the_model_calls_again_stays_dropped(asynchronous):
    class Fragile(nn.Linear):
        def forward(self, x):
            raise ValueError("broken")

    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.fragile, self.last = Fragile(12, 12), nn.Linear(12, 4)

        def forward(self, x):
            for _ in range(2):
                with contextlib.suppress(ValueError):
                    self.fragile(x / 0)
            return self.last(x)

    with pytest.warns(UserWarning, match="'fragile'"):
        projectors = fit(Stubborn(), [decaying(20, 12)], stop=RETURN)
    assert list(projectors) == ["last"]


def test_inputs_that_the_model_changes_later_are_learned_as_they_were(monkeypatch):
    class InPlace(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(2))

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([InPlace(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)])

        def forward(self, x):
            x = x.clone()
            for layer in self.layers:
                x += layer(x)
                x.data.mul_(0.7)
            return x

    model, batches = Residual(), decaying(400, 12).split(50)
    synchronous = fit(model, batches)
    monkeypatch.setattr(async_device, "is_async_device", lambda device: True)
    assert_equal(synchronous, fit(model, batches))


def test_a_layer_that_is_called_twice_learns_both_inputs(monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.layer(torch.relu(self.other(x) + self.layer(x)))

    model, batches = Twice(), decaying(400, 12).split(50)
    synchronous = fit(model, batches)
    monkeypatch.setattr(async_device, "is_async_device", lambda device: True)
    delayed = fit(model, batches)
    assert_equal(synchronous, delayed)
    assert (delayed["layer"].samples, delayed["other"].samples) == (800, 400)


def test_layers_with_a_common_invalid_input_are_all_dropped(asynchronous):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.last = (nn.Linear(12, 12) for _ in range(3))

        def forward(self, x):
            y = x / 0
            return self.query(y), self.key(y), self.last(x)

    with pytest.warns(UserWarning, match="got none for 2"):
        projectors = fit(Attention(), [decaying(60, 12)] * 3, stop=RETURN)
    assert list(projectors) == ["last"] and projectors["last"].samples == 180
    for name in ("query", "key"):
        assert projectors.missing[name].startswith(f"layer {name!r}: ")


def test_the_first_error_is_the_one_that_is_raised(asynchronous):
    layers = [nn.Linear(12, 12) for _ in range(3 * MOST_PENDING)]
    layers.insert(3, Lambda(lambda x: x / 0))
    with pytest.raises(NonFiniteError, match="layer '4': "):
        fit(nn.Sequential(*layers), [decaying(60, 12)])


def test_ctrl_c_stays_ctrl_c_while_updates_wait(asynchronous):
    def interrupt(x):
        raise KeyboardInterrupt

    model = nn.Sequential(Lambda(lambda x: x / 0), nn.Linear(12, 12), Lambda(interrupt))
    with pytest.raises(KeyboardInterrupt):
        fit(model, [decaying(60, 12)])


def test_an_update_on_a_cpu_is_finished_at_once_after_one_that_waits(monkeypatch):
    class TwoDevices(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 12), nn.Linear(12, 12)

        def forward(self, x):
            h = self.first(x)
            y = self.second(h)
            h.data.mul_(0)
            return y

    model, batches = TwoDevices(), decaying(400, 16).split(50)
    synchronous = fit(model, batches)
    # The tensors of the second layer are on the CPU, those of the first on another device.
    monkeypatch.setattr(
        async_update.AsyncUpdate, "is_async", property(lambda self: self.rows.shape[1] == 16)
    )
    assert_equal(synchronous, fit(model, batches))


def test_an_update_waits_for_a_bounded_number_of_layers(asynchronous, monkeypatch):
    waiting, longest = [], []

    class Watched(RandomizedSVD):
        def begin_update(self, batch, weights=None):
            waiting.append(self)
            longest.append(len(waiting))
            return super().begin_update(batch, weights)

        def _finish_update(self, update):
            assert waiting.pop(0) is self
            return super()._finish_update(update)

    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(12)))
    fit(model, decaying(150, 12).split(50), learner=Watched)
    assert max(longest) == MOST_PENDING + 1 and not waiting


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_batch_stops_a_cuda_device():
    rows = decaying(40_000, 64).cuda()
    learner = RandomizedSVD(3, oversample=13).update(rows[:20_000])
    torch.cuda.set_sync_debug_mode("error")
    try:
        learner.begin_update(rows[20_000:20_512]).finish()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert learner.samples == 20_512
