import pytest
import torch
from peft import LoraConfig, get_peft_model

import ipa_hf
from ipa_core import ExactCovariance, fit_projector
from ipa_torch import fit_projectors

from .models import TARGETS, config, make, text_batches


@pytest.fixture(scope="module")
def projectors():
    """Return projectors of mean rank 4, where a shared projector counts once."""
    options = {"targets": TARGETS["llama"], "learner": ExactCovariance, "progress": False}
    learned = fit_projectors(make("llama"), text_batches(), 8, **options)
    return learned.allocate(4 * len(learned.shared))


@pytest.mark.parametrize("rslora", [False, True])
def test_every_scaling_stays(projectors, rslora):
    lora = config(use_rslora=rslora)
    before = lora.to_dict()
    model = ipa_hf.get_ipa_model(make("llama"), ipa_hf.match_ranks(lora, projectors), projectors)
    layers = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    assert {name: x.r["default"] for name, x in layers.items()} == {
        name: projector.rank for name, projector in projectors.items()
    }
    assert len({x.r["default"] for x in layers.values()}) > 1
    expected = 8 / 2 if rslora else 8 / 4
    assert all(x.scaling["default"] == pytest.approx(expected) for x in layers.values())
    assert lora.to_dict() == before


def test_survives_saving(projectors, tmp_path):
    lora = ipa_hf.match_ranks(config(), projectors)
    model = ipa_hf.get_ipa_model(make("llama"), lora, projectors)
    model.save_pretrained(tmp_path)
    again = ipa_hf.load_adapter(make("llama"), tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


class Nested(torch.nn.Module):
    """Layers whose names end in the names of others, as PEFT's patterns read them."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(6, 6)
        self.a_proj = torch.nn.Linear(6, 6)
        self.a = torch.nn.ModuleDict({"proj": torch.nn.Linear(6, 6)})
        self.z = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"proj": torch.nn.Linear(6, 6)})})


@pytest.mark.parametrize("order", [1, -1])
def test_names_that_end_in_names_of_others(order, tmp_path):
    ranks = {"proj": 2, "a_proj": 4, "a.proj": 3, "z.a.proj": 5}
    names = list(ranks)[::order]
    projectors = {name: fit_projector(torch.eye(6), ranks[name]) for name in names}
    lora = ipa_hf.match_ranks(LoraConfig(r=4, target_modules=names), projectors)
    lora.save_pretrained(tmp_path)  # sorts the patterns
    for loaded in (lora, LoraConfig.from_pretrained(tmp_path)):
        model = get_peft_model(Nested(), loaded)
        layers = dict(model.get_base_model().named_modules())
        assert {name: layers[name].r["default"] for name in ranks} == ranks
        assert {layers[name].scaling["default"] for name in ranks} == {2.0}
