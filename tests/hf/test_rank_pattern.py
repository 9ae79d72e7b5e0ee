import pytest
import torch

import ipa_hf
from ipa_core import ExactCovariance
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
