"""A fine-tune that is interrupted keeps P, and its online learners go on."""

import pytest
import torch
from torch import nn

from ipa_core import HebbianRule, IncrementalPCA
from ipa_core.errors import FileFormatError, SettingError
from ipa_torch import (
    OnlineLearning,
    adapter_state_dict,
    attach,
    fit_projectors,
    load_adapter_state_dict,
)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


def batch(number):
    return torch.randn(40, 12, generator=torch.Generator().manual_seed(number))


def train(model, optimizer, online, steps):
    for step in steps:
        optimizer.zero_grad()
        (model(batch(step)) - 1).square().mean().backward()
        optimizer.step()
        online.step(optimizer)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def begun():
    model = base()
    attach(model, fit_projectors(model, [batch(99)], 3, progress=False))
    return model, optimizer_of(model)


@pytest.mark.parametrize("learner", [IncrementalPCA, HebbianRule])
def test_interrupted_online_fine_tune_goes_on_as_if_nothing_had_been(tmp_path, learner):
    model, optimizer = begun()
    with OnlineLearning(model, learner=learner) as online:
        train(model, optimizer, online, range(10))
    whole = adapter_state_dict(model)

    model, optimizer = begun()
    with OnlineLearning(model, learner=learner) as online:
        train(model, optimizer, online, range(6))
        saved = {
            "adapter": adapter_state_dict(model),
            "optimizer": optimizer.state_dict(),
            "online": online.state_dict(),
        }
    torch.save(saved, tmp_path / "step-6.pt")

    model, saved = base(), torch.load(tmp_path / "step-6.pt")
    load_adapter_state_dict(model, saved["adapter"])
    assert all(
        torch.equal(value, saved["adapter"][name])
        for name, value in adapter_state_dict(model).items()
    )
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(saved["optimizer"])
    with OnlineLearning(model, learner=learner) as online:
        online.load_state_dict(saved["online"])
        train(model, optimizer, online, range(6, 10))
    again = adapter_state_dict(model)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_state_of_other_learning_is_refused():
    model, optimizer = begun()
    with OnlineLearning(model) as online:
        train(model, optimizer, online, range(2))
        state = online.state_dict()
    with pytest.raises(FileFormatError, match="layer '0'.*HebbianRule"):
        OnlineLearning(model, learner=HebbianRule).load_state_dict(state)
    with pytest.raises(SettingError, match="expected the state of"):
        OnlineLearning(model).load_state_dict({"0": state["0"]})
