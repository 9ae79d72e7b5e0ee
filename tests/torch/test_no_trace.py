"""Fits and adapters leave every tensor and attribute of a model as it was, bit by bit."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ipa_torch import (
    attach,
    detach,
    fit_gradient_projectors,
    fit_projectors,
    merge,
    set_adapter,
    store_activations,
    unmerge,
)

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


class MergingLinear(nn.Linear):
    """Merges on `train(False)` and takes apart on `train(True)`, as loralib does."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.A, self.B = (
            nn.Parameter(torch.randn(2, sizes[0])),
            nn.Parameter(torch.ones(sizes[1], 2)),
        )
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.weight += (-1 if mode else 1) * self.B @ self.A
            self.merged = not mode
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.merged else y + x @ self.A.T @ self.B.T


PARTS = {
    "plain": lambda layer: layer,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral norm": nn.utils.spectral_norm,
    "merging": lambda layer: MergingLinear(16, 16),
    "hooks": lambda layer: (layer.register_forward_hook(print_nothing), layer)[1],
}


def print_nothing(*_):
    return None


def peft_model(net):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], r=2))


def state(model):
    """Return all attributes of all modules: tensors as copies with their identity and flags."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                for part, tensor in value.items():
                    flags = id(tensor), getattr(tensor, "requires_grad", None)
                    copied = None if tensor is None else tensor.detach().clone()
                    found[name, key, part] = flags, copied
            elif isinstance(value, torch.Tensor):
                found[name, key] = None, value.detach().clone()
            elif isinstance(value, dict):
                found[name, key] = {part: id(item) for part, item in value.items()}
            else:
                found[name, key] = id(value), repr(value)
    return found


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        other = second[key]
        if isinstance(value, tuple) and isinstance(value[1], torch.Tensor):
            assert value[0] == other[0] and torch.equal(value[1], other[1]), key
        else:
            assert value == other, key


@pytest.mark.parametrize("part", [*PARTS, "PEFT"])
@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(tmp_path, part, training):
    torch.manual_seed(0)
    layer = PARTS.get(part, PARTS["plain"])(nn.Linear(16, 16))
    net = nn.Sequential(layer, nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 4))
    if part == "PEFT":
        net = peft_model(net)
    with torch.no_grad():
        net.eval()(X)  # the old spectral norm keeps its latest product as an attribute
    net.train(training)
    before, random = state(net), torch.get_rng_state()
    projectors = fit_projectors(net, [X], 3, progress=False)
    assert_same(before, state(net))
    store_activations(net, [X], tmp_path, progress=False)
    assert_same(before, state(net))
    fit_gradient_projectors(net, [X], 3, loss=lambda model, x: model(x).square().sum())
    assert_same(before, state(net))
    attach(net, projectors)
    set_adapter(net, None)
    set_adapter(net, "default")
    if part == "plain":
        merge(net)
        unmerge(net)
    detach(net)
    assert_same(before, state(net))
    assert torch.equal(torch.get_rng_state(), random)
