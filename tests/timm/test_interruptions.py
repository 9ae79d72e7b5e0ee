"""Exceptions and interruptions at any call: a timm model is as before a change, or as after it."""

from functools import partial

import pytest
import torch

timm = pytest.importorskip("timm", reason="needs timm on the path: make test-timm")

from timm.models.beit import Beit
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import ipa_timm
from ipa_timm import adapter_file, adapters, batchnorm, fused_qkv
from ipa_torch.extension import adapter_layers
from tests.interruptions import interrupted, interrupted_at_lines

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()


def beit():
    torch.manual_seed(0)
    return Beit(
        img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=3, qkv_bias=True
    )


def resnet():
    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1, 1], channels=(8, 8, 8, 8), stem_width=8, num_classes=3)


MODELS = {"beit": beit, "resnet": resnet}
PROJECTORS = {
    name: ipa_timm.fit_projectors(make(), [IMAGES], 2, progress=False)
    for name, make in MODELS.items()
}


def adapted(name):
    model = MODELS[name]()
    ipa_timm.attach(model, PROJECTORS[name])
    torch.manual_seed(1)
    for _, layer in adapter_layers(model):
        nn.init.normal_(layer.lora_B["default"])
    for parameter in adapters.classifier_parameters(model).values():
        nn.init.normal_(parameter)
    return model


def attributes(module):
    """Return what a change may set of a module."""
    flags = {key: value for key, value in vars(module).items() if isinstance(value, bool)}
    hooks = [hook.__name__ for hook in module._forward_pre_hooks.values()]
    trained = {key: p.requires_grad for key, p in module._parameters.items() if p is not None}
    return type(module), flags, hooks, trained


def state_of(model):
    modules = {name: attributes(module) for name, module in model.named_modules()}
    tensors = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
    marks = {key: value for key, value in vars(model).items() if key.startswith("_ipa_timm")}
    return modules, tensors, marks, model.eval()(IMAGES).detach().numpy().tobytes()


CHANGES = {
    "attach": lambda model, name, _: ipa_timm.attach(model, PROJECTORS[name]),
    "load_adapter": lambda model, _, path: ipa_timm.load_adapter(model, path),
    "merge_and_unload": lambda model, *_: ipa_timm.merge_and_unload(model),
    "detach": lambda model, *_: ipa_timm.detach(model),
}
PLACES = [
    (adapters, "use_separate_qkv_bias"),
    (adapters, "restore_fused_qkv_bias"),
    (fused_qkv, "_set_switch"),
    (batchnorm, "freeze_batchnorm_stats"),
    (batchnorm, "unfreeze_batchnorm_stats"),
    (batchnorm, "_batch_norms"),
    (adapter_file, "prepare_for_training"),
    (nn.Module, "register_forward_pre_hook"),
    (torch.Tensor, "requires_grad_"),
    (torch.Tensor, "copy_"),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MODELS)
def test_changes(monkeypatch, tmp_path, name, change):
    """The half of `ipa_torch` was undone, or done, alone."""
    path = tmp_path / "adapter"
    ipa_timm.save_adapter(adapted(name), path)
    is_added = change in ("attach", "load_adapter")
    make = MODELS[name] if is_added else partial(adapted, name)
    after = make()
    before = state_of(after)
    CHANGES[change](after, name, path)
    after = state_of(after)
    assert before != after

    def call(model):
        CHANGES[change](model, name, path)

    for model in interrupted(monkeypatch, PLACES, make, call):
        assert state_of(model) in (before, after)
    lines = [adapters, adapter_file, batchnorm, fused_qkv]
    for model in interrupted_at_lines(lines, make, call):
        assert state_of(model) in (before, after)


def test_fits_restore_the_switch_of_a_fused_qkv():
    before = state_of(beit())

    def fit(model):
        ipa_timm.fit_projectors(model, [IMAGES], 2, progress=False)

    for model in interrupted_at_lines([fused_qkv], beit, fit):
        assert state_of(model) == before
