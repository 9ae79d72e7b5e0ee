"""Models whose weights accelerate offloads: adapters are kept where the layers compute."""

import copy

import pytest
import torch
from torch import nn

from ipa_torch import (
    LayerError,
    adapter_state_dict,
    attach,
    detach,
    fit_projectors,
    load_adapter_state_dict,
    merge,
)
from ipa_torch.extension import execution_device

from .models import Convolutions, Transformer

accelerate = pytest.importorskip("accelerate")


def token_batches():
    return [{"input_ids": torch.randint(0, 20, (4, 5))} for _ in range(3)]


def image_batches():
    return [torch.randn(4, 3, 12, 12) for _ in range(3)]


def offloaded(model, method, folder):
    model = copy.deepcopy(model)
    if method == "disk":
        return accelerate.disk_offload(model, folder, torch.device("cpu"))
    return accelerate.cpu_offload(model, torch.device("cpu"))


def call(model, batch):
    return model(**batch) if isinstance(batch, dict) else model(batch)


def train(model, batches):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for batch in batches:
        call(model, batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def has_matrix(name, module):
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))


@pytest.mark.parametrize("method", ["cpu", "disk"])
@pytest.mark.parametrize(
    ("make", "batches"), [(Transformer, token_batches), (Convolutions, image_batches)]
)
@pytest.mark.parametrize("trainable", [False, True])
def test_as_in_memory(make, batches, method, trainable, tmp_path):
    whole, data = make(), batches()
    split = offloaded(whole, method, tmp_path)
    assert all(p.is_meta for p in split.parameters())
    for model in (whole, split):
        projectors = fit_projectors(model, data, 2, targets=has_matrix, progress=False)
        attach(model, projectors, trainable=trainable)
        train(model, data)
    expected, actual = adapter_state_dict(whole), adapter_state_dict(split)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert not actual[name].is_meta and torch.equal(actual[name], tensor), name
    assert torch.equal(call(split, data[0]), call(whole, data[0]))
    with pytest.raises(LayerError, match="expected a weight that is loaded"):
        merge(split)
    detach(split)
    load_adapter_state_dict(split, expected)
    assert torch.equal(call(split, data[0]), call(whole, data[0]))


def test_weights_that_nothing_loads_are_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 2))
    projectors = fit_projectors(model, [torch.randn(9, 6)], 2, progress=False)
    attach(model, projectors)
    state = adapter_state_dict(model)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 2))
    for add in (
        lambda: attach(empty, projectors),
        lambda: load_adapter_state_dict(empty, state),
    ):
        with pytest.raises(LayerError, match=r"layer '0': .*load the model's weights first"):
            add()
    assert type(empty[0]) is nn.Linear


def test_hooks_in_sequence_and_inside_of_wrappers():
    class Wrapper(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        @property
        def weight(self):
            return self.base_layer.weight

    layer = nn.Linear(6, 2)
    hooks = accelerate.hooks
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    hooks.add_hook_to_module(
        layer, hooks.AlignDevicesHook(torch.device("cpu"), offload=True), append=True
    )
    assert layer.weight.is_meta
    assert execution_device(Wrapper(layer)) == torch.device("cpu")
    assert execution_device(nn.Linear(2, 2)) == torch.device("cpu")
    assert execution_device(nn.Identity()) == torch.device("cpu")
