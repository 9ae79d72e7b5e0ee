"""Threads: fits, passes and changes of adapters beside each other."""

import copy
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from ipa_core.errors import SettingError
from ipa_torch import (
    LayerError,
    OnlineLearning,
    adapter_state_dict,
    attach,
    detach,
    disable_adapter,
    fit_gradient_projectors,
    fit_projectors,
    load_adapter_state_dict,
    merge,
    set_adapter,
    store_activations,
)
from ipa_torch._adapters import pass_lock
from ipa_torch._capture.eval_mode import eval_mode
from tests.torch import thread_stress

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))


class Slow(nn.Module):
    """Blocks in the middle of a pass until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.reached, self.proceed = threading.Event(), threading.Event()
        self.blocks = False

    def forward(self, x):
        if self.blocks:
            self.reached.set()
            assert self.proceed.wait(10)
        return x


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def adapted(net):
    projectors = fit_projectors(net, [X], 4, progress=False)
    attach(net, projectors)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return projectors


def in_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(10)


@pytest.mark.parametrize("kind", ["fit", "store", "gradient"])
def test_passes_of_other_threads_are_not_learned(tmp_path, kind):
    net = model()

    def forward(module, batch):
        in_thread(lambda: module(9 * X[:7]))
        output = module(batch)
        in_thread(lambda: module(9 * X[:7]))
        return output

    if kind == "fit":
        found, wanted = (
            fit_projectors(net, [X] * 2, 4, forward=run, progress=False) for run in (forward, None)
        )
    elif kind == "store":
        store = store_activations(net, [X] * 2, tmp_path, forward=forward, progress=False)
        assert {layer.samples for layer in store.values()} == {64}
        return
    else:
        found, wanted = (
            fit_gradient_projectors(net, [X] * 2, 4, loss=lambda m, b, run=run: run(m, b).sum())
            for run in (forward, lambda module, batch: module(batch))
        )
    for name in wanted:
        assert found[name].samples == wanted[name].samples
        assert torch.equal(found[name].components, wanted[name].components)


def test_model_that_runs_in_another_thread_only_is_said_so():
    def forward(module, batch):
        in_thread(lambda: module(batch))

    with pytest.raises(LayerError, match="ran in other threads only"):
        fit_projectors(model(), [X], 4, forward=forward, progress=False)


def test_online_learning_leaves_out_other_threads():
    net = model()
    adapted(net)
    net.train()
    with OnlineLearning(net) as online:
        net(X)
        in_thread(lambda: net(X))
        assert "32 rows" in repr(online)


def test_overlapping_fits_of_a_model_restore_flags_and_random_state():
    net = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5))
    net[1].eval()
    before, first, second = torch.get_rng_state(), threading.Event(), threading.Event()
    entered = threading.Barrier(3)

    def fit(leave):
        with eval_mode(net):
            torch.rand(3)
            entered.wait(10)
            assert leave.wait(10)

    with ThreadPoolExecutor(2) as pool:
        fits = [pool.submit(fit, leave) for leave in (first, second)]
        entered.wait(10)
        first.set()
        fits[0].result(10)
        assert not net.training and not net[0].training  # the second fit still needs it
        second.set()
        fits[1].result(10)
    assert (net.training, net[0].training, net[1].training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), before)


CHANGES = {
    "merge": lambda net, state: merge(net),
    "switch": lambda net, state: set_adapter(net, None),
    "detach": lambda net, state: detach(net),
    "load": lambda net, state: load_adapter_state_dict(net, state),
    "attach": lambda net, state: attach(net, state, adapter_name="second"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("whole", [True, False])
def test_change_waits_for_a_pass(change, whole):
    """A pass that has begun ends with the adapter, in all its layers."""
    net, slow = model(), Slow()
    net.insert(2, slow)
    projectors = adapted(net)
    state = projectors if change == "attach" else adapter_state_dict(net)
    if change == "load":
        state = {k: -v if k.endswith("lora_B") else v for k, v in state.items()}
    call = net if whole else net[0]
    if not whole:  # a single layer is served
        net[0].base_layer.register_forward_hook(lambda module, args, output: slow(output))
    model_output, before = net(X), call(X)
    slow.blocks, done = True, threading.Event()

    def run():
        CHANGES[change](net, state)
        done.set()

    with ThreadPoolExecutor(2) as pool:
        served = pool.submit(call, X)
        assert slow.reached.wait(10)
        changed = pool.submit(run)
        assert not done.wait(0.1)
        slow.blocks = False
        slow.proceed.set()
        torch.testing.assert_close(served.result(10), before)
        changed.result(10)
    changes_outputs = change != "merge"
    assert changes_outputs != torch.allclose(net(X), model_output, atol=1e-4)


def test_pass_within_a_pass_and_change_within_a_pass_do_not_wait():
    net = model()
    adapted(net)
    expected, inner = net(X), []

    def hook(*_):
        if not inner:
            inner.append(None)
            inner.append(net(X))
            merge(net)

    net[2].register_forward_hook(hook)
    net(X)
    torch.testing.assert_close(inner[1], expected)
    torch.testing.assert_close(net(X), expected)


def test_layers_in_threads_of_a_pass_do_not_wait_for_a_change():
    """A model that runs its parts in threads does not block with a change that waits for it."""

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.slow = nn.Linear(16, 4), nn.Linear(16, 4), Slow()

        def forward(self, x):
            self.slow(x)
            with ThreadPoolExecutor(2) as pool:
                parts = [pool.submit(layer, x) for layer in (self.first, self.second)]
                return sum(part.result(10) for part in parts)

    net = Parallel()
    projector = fit_projectors(model(), [X], 4, progress=False)["0"]
    attach(net, {"first": projector, "second": projector})
    net.slow.blocks = True
    with ThreadPoolExecutor(2) as pool:
        served = pool.submit(net, X)
        assert net.slow.reached.wait(10)
        changed = pool.submit(merge, net)
        while not net.first.pass_lock._changes_queued:
            pass
        net.slow.proceed.set()
        served.result(10)
        changed.result(10)


def test_pass_that_fails_lets_changes_through():
    net = model()
    adapted(net)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        net(X[:, :3])
    in_thread(lambda: merge(net))


def test_pass_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setattr(pass_lock, "_PATIENCE", 0.1)
    net = model()
    adapted(net)
    net[0].pass_lock.enter_pass()
    with pytest.raises(SettingError, match="got 1 that still run; stop serving first"):
        in_thread(lambda: merge(net))
    net(X)
    net[0].pass_lock.leave_pass()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copy_has_a_lock_of_its_own(copied):
    net = model()
    adapted(net)
    twin = copied(net)
    locks = {layer.pass_lock for layer in (twin[0], twin[2], twin[4])}
    assert len(locks) == 1 and net[0].pass_lock not in locks
    with net[0].pass_lock.change():
        torch.testing.assert_close(in_thread(lambda: twin(X)), twin(X))
    detach(twin)
    assert not twin._forward_hooks and not twin._forward_pre_hooks
    detach(net)
    assert not net._forward_hooks and not net._forward_pre_hooks


def test_parts_with_locks_of_their_own_change_together():
    net = nn.Sequential(model(), nn.Linear(4, 16))
    attach(net[0], fit_projectors(net[0], [X], 4, progress=False))
    projector = fit_projectors(nn.Sequential(nn.Linear(4, 4)), [X[:, :4]], 2, progress=False)["0"]
    attach(net, {"1": projector}, adapter_name="other")
    expected = net(X)
    merge(net, "other")
    with disable_adapter(net):
        net(X)
    detach(net)
    torch.testing.assert_close(net(X), expected)


@pytest.mark.parametrize("kind", thread_stress.KINDS)
def test_eight_threads(kind):
    """`python -m tests.torch.thread_stress` makes 10,000 calls of each kind."""
    assert kind(80) == (80, 0)


def test_the_random_state_is_read_and_set_in_one_file():
    """Two threads that read it at once waited for each other, in one of 15 runs of the above."""
    calls = re.compile(r"torch\.(get|set)_rng_state\(|fork_rng\(")
    files = (Path(__file__).parents[2] / "integrations").rglob("*.py")
    found = {path.name for path in files if calls.search(path.read_text("utf-8"))}
    assert found == {"random_state.py"}
