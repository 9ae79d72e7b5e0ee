"""Exceptions and interruptions at any call: a model is as before a change, or as after it."""

import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ipa_core import RandomizedSVD, SettingError
from ipa_torch import (
    AdapterLayer,
    CheckpointConfig,
    OnlineLearning,
    adapter_state_dict,
    attach,
    detach,
    disable_adapter,
    fit_gradient_projectors,
    fit_learners,
    fit_projectors,
    load_adapter_state_dict,
    merge,
    set_adapter,
    store_activations,
    unmerge,
)
from ipa_torch._adapters import layer_replacement
from ipa_torch._adapters.adapter_layer import adapter_layers
from ipa_torch._capture import eval_mode
from ipa_torch._fit import folder_lock, shared_inputs
from ipa_torch._fit.activation_writer import _Writer
from ipa_torch._fit.collector import ActivationCollector
from tests.interruptions import interrupted, interrupted_at_lines

BATCHES = [torch.linspace(-1, 1, 96).mul(k).sin().reshape(12, 8) for k in range(1, 5)]


class Net(nn.Module):
    """Layers with hooks and flags, of which one is called through a list as well."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 2)
        self.calls = [self.first]
        self.first.eval()
        self.second.weight.requires_grad_(False)
        self.last.register_forward_hook(lambda module, args, output: None)

    def forward(self, x):
        return self.last((self.calls[0](x) + self.second(x)).relu())


def net():
    torch.manual_seed(0)
    return Net()


PROJECTORS = fit_projectors(net(), BATCHES, 2, progress=False)


def adapted(merged=False, second=False):
    model = net()
    attach(model, PROJECTORS)
    if second:
        attach(model, {"last": PROJECTORS["last"]}, adapter_name="second", trainable=True)
    torch.manual_seed(1)
    for _, layer in adapter_layers(model):
        for lora_B in layer.lora_B.values():
            nn.init.normal_(lora_B)
    if merged:
        merge(model, "default")
    return model


def hooks_and_flags(model):
    return {
        name: (
            type(module),
            module.training,
            [len(getattr(module, kind)) for kind in hook_names()],
            [(key, p.requires_grad) for key, p in module._parameters.items() if p is not None],
        )
        for name, module in model.named_modules()
    }


def hook_names():
    return ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_with_kwargs", "_backward_hooks")


def state_of(model):
    tensors = {key: value.tolist() for key, value in model.state_dict().items()}
    layers = [
        (name, layer.active, layer.merged, [*layer.lora_B], dict(layer.dropouts),
         [layer.projection(key).users for key in layer.projections])
        for name, layer in adapter_layers(model)
    ]  # fmt: skip
    marks = sorted(key for key in vars(model) if key.startswith("_ipa_"))
    called = [type(layer) for layer in model.calls]
    return hooks_and_flags(model), tensors, layers, marks, called


def serves_other_threads(model):
    """Return whether another thread can change the model's adapters at once."""
    thread = threading.Thread(target=set_adapter, args=(model, None), daemon=True)
    thread.start()
    thread.join(5)
    return not thread.is_alive()


STATE = {key: value.clone() for key, value in adapter_state_dict(adapted()).items()}


def disabled(model):
    with disable_adapter(model):
        pass


CHANGES = {
    "attach": (net, lambda m: attach(m, PROJECTORS)),
    "attach trained": (net, lambda m: attach(m, PROJECTORS, trainable=True, dropout=0.1)),
    "attach second": (adapted, lambda m: attach(m, PROJECTORS, adapter_name="second")),
    "detach": (adapted, detach),
    "detach merged": (partial(adapted, True), detach),
    "detach second": (partial(adapted, False, True), lambda m: detach(m, "second")),
    "merge": (adapted, merge),
    "merge another": (partial(adapted, True, True), lambda m: merge(m, "second")),
    "unmerge": (partial(adapted, True), unmerge),
    "set": (partial(adapted, False, True), lambda m: set_adapter(m, "default")),
    "disable": (partial(adapted, True, True), disabled),
    "load": (net, lambda m: load_adapter_state_dict(m, STATE)),
    "load again": (adapted, lambda m: load_adapter_state_dict(m, STATE)),
}
PLACES = [
    (AdapterLayer, "__setattr__"),
    (AdapterLayer, "add"),
    (AdapterLayer, "remove"),
    (AdapterLayer, "merge"),
    (nn.Module, "requires_grad_"),
    (torch.Tensor, "requires_grad_"),
    (torch.Tensor, "copy_"),
    (torch, "zeros"),
    (torch, "promote_types"),
    (layer_replacement, "move_hooks"),
    (layer_replacement, "replace_everywhere"),
]


@pytest.mark.filterwarnings("ignore:the weight of layer")
@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_adapters(monkeypatch, name):
    make, change = CHANGES[name]
    after = make()
    before, _ = state_of(after), change(after)
    after = state_of(after)
    for model in interrupted(monkeypatch, PLACES, make, change):
        assert state_of(model) in (before, after)
        assert serves_other_threads(model)
        detach(model)
        assert not any(isinstance(module, AdapterLayer) for module in model.modules())


def test_steps_of_online_learning(monkeypatch):
    def learned():
        model = adapted()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = SimpleNamespace(state={p: {"exp_avg": torch.ones_like(p)} for p in trained})
        with OnlineLearning(model) as online:
            for batch in BATCHES:
                model.train()(batch)
        return model, online, optimizer

    def numbers(model, _, optimizer):
        moments = [entry["exp_avg"].tolist() for entry in optimizer.state.values()]
        return state_of(model), moments

    after = learned()
    before, _ = numbers(*after), after[1].step(after[2])
    after = numbers(*after)
    places = [(torch.Tensor, "copy_"), (torch.Tensor, "double"), (torch, "full_like")]
    calls = interrupted(monkeypatch, places, learned, lambda all_: all_[1].step(all_[2]))
    for model, online, optimizer in calls:
        assert numbers(model, online, optimizer) in (before, after)
        assert not any(layer._forward_pre_hooks for _, layer in adapter_layers(model))


def test_an_interrupted_pass_does_not_hold_the_model():
    """torch calls no hook after a KeyboardInterrupt: changes in other threads waited a minute."""

    def interrupt(module, args):
        raise KeyboardInterrupt

    model = adapted()
    handle = model.last.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(BATCHES[0])
    assert serves_other_threads(model)
    with pytest.raises(KeyboardInterrupt):
        model(BATCHES[0])
    handle.remove()
    model(BATCHES[0])
    assert not model.first.pass_lock.in_pass
    assert type(model.first) is AdapterLayer and not isinstance(model.first, nn.Linear)


# Fits. ------------------------------------------------------------------------------------------


def loss(model, batch):
    return model(batch).square().mean()


def fit(model, folder, **options):
    return fit_projectors(model, BATCHES, 2, progress=False, **options)


FITS = {
    "fit": fit,
    "several passes": partial(fit, max_bytes=10_000),
    "checkpoint": lambda m, folder: fit(m, None, checkpoint=CheckpointConfig(folder, batches=1)),
    "learners": lambda m, _: fit_learners(m, BATCHES, heads=2, progress=False),
    "gradients": lambda m, _: fit_gradient_projectors(m, BATCHES, 2, loss=loss),
    "store": lambda m, folder: store_activations(
        m, BATCHES, folder, shard_bytes=300, progress=False
    ),
}
FIT_PLACES = [
    (Net, "forward"),
    (RandomizedSVD, "begin_update"),
    (nn.Module, "register_forward_pre_hook"),
    (nn.Module, "register_forward_hook"),
    (ActivationCollector, "_begin"),
    (ActivationCollector, "finish"),
    (ActivationCollector, "snapshot"),
    (shared_inputs.SharedInputTree, "finish"),
    (_Writer, "_flush"),
    (torch, "set_rng_state"),
    (torch.backends.mha, "set_fastpath_enabled"),
    (torch.Tensor, "detach"),
]


def global_state():
    return (
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
        len(eval_mode._GLOBAL_STATE._holders),
        len(eval_mode._TRAINING_FLAGS._held),
    )


@pytest.mark.parametrize("name", FITS)
def test_fits(monkeypatch, tmp_path, name):
    run, number = FITS[name], 0
    model = net()
    whole = run(model, tmp_path / "whole")
    flags, globals_ = hooks_and_flags(net()), global_state()

    def folder():
        return tmp_path / str(number)

    for model in interrupted(monkeypatch, FIT_PLACES, net, lambda m: run(m, folder())):
        assert hooks_and_flags(model) == flags
        assert global_state() == globals_
        if name in ("checkpoint", "store") and number % 3 == 0:
            resumed = run(net(), folder())
            for layer in whole:
                assert resumed[layer].samples == whole[layer].samples
                if name == "checkpoint":
                    assert torch.equal(resumed[layer].components, whole[layer].components)
            assert not [path for path in folder().glob(".*") if path.name != ".lock"]
        number += 1


def test_each_line_of_the_evaluation_mode():
    """An interruption left flags cleared, random states held, or a fit counted that had ended."""

    def evaluated(model):
        with eval_mode.eval_mode(model):
            assert not model.last.training
            torch.rand(3)
            with eval_mode.eval_mode(model.last):
                torch.rand(3)

    flags, globals_ = hooks_and_flags(net()), global_state()
    for model in interrupted_at_lines([eval_mode], net, evaluated):
        assert hooks_and_flags(model) == flags
        assert global_state() == globals_
    other = threading.Thread(target=evaluated, args=[net()], daemon=True)
    other.start()
    other.join(10)
    assert not other.is_alive(), "a lock was left"


def test_each_line_of_the_evaluation_mode_beside_another_fit():
    model = net()
    flags, globals_ = hooks_and_flags(model), global_state()

    def evaluated(_):
        with eval_mode.eval_mode(model):
            assert not model.last.training

    with eval_mode.eval_mode(model):
        within, global_within = hooks_and_flags(model), global_state()
        for _ in interrupted_at_lines([eval_mode], lambda: None, evaluated):
            assert hooks_and_flags(model) == within
            assert global_state() == global_within
    assert hooks_and_flags(model) == flags
    assert global_state() == globals_


@pytest.mark.parametrize("kind", ["new", "empty", "full"])
def test_each_line_of_a_folder_lock(tmp_path, kind):
    """An interruption left a new folder, with the file of the lock."""
    count = 0

    def folder():
        nonlocal count
        count += 1
        path = tmp_path / str(count)
        if kind != "new":
            path.mkdir()
        if kind == "full":
            (path / "content").write_text("kept")
        return path

    def locked(path):
        with folder_lock.lock_folder(path):
            assert (path / ".lock").read_text().startswith("process")

    for path in interrupted_at_lines([folder_lock], folder, locked):
        assert path.exists() == (kind != "new")
        assert not (path / "content").exists() or kind == "full"
        with folder_lock.lock_folder(path):
            pass


def test_an_interrupted_run_beside_another_leaves_its_lock(tmp_path):
    path = tmp_path / "folder"

    def locked(path):
        with (
            pytest.raises(SettingError, match="another run writes to"),
            folder_lock.lock_folder(path),
        ):
            pass

    with folder_lock.lock_folder(path):
        for _ in interrupted_at_lines([folder_lock], lambda: path, locked):
            assert (path / ".lock").exists()
            locked(path)
    assert not path.exists()
