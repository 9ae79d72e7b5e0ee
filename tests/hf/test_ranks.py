import pytest
import torch

import ipa_hf
from ipa_core import ExactCovariance, RankError
from ipa_torch import fit_projectors

from .models import TARGETS, config, make, text_batches


@pytest.fixture(scope="module")
def projectors():
    options = {"targets": TARGETS["llama"], "learner": ExactCovariance, "progress": False}
    return fit_projectors(make("llama"), text_batches(), 8, **options)


@pytest.mark.parametrize("rslora", [False, True])
def test_total_rank_and_every_scaling_stay(projectors, rslora):
    lora = config(use_rslora=rslora)
    before = lora.to_dict()
    model = ipa_hf.get_ipa_model(
        make("llama"), ipa_hf.redistribute_ranks(lora, projectors), projectors
    )
    layers = [m for m in model.modules() if "default" in getattr(m, "lora_A", {})]
    ranks = [layer.r["default"] for layer in layers]
    assert sum(ranks) == 4 * len(layers)
    assert len(set(ranks)) > 1
    expected = 8 / 2 if rslora else 8 / 4
    assert all(layer.scaling["default"] == pytest.approx(expected) for layer in layers)
    assert lora.to_dict() == before


def test_largest_shares_are_kept(projectors):
    chosen = ipa_hf.redistribute_ranks(config(), projectors)
    kept, left = [], []
    for name, projector in projectors.items():
        rank = chosen.rank_pattern.get(name, 4)
        assert 1 <= rank <= 8
        shares = projector.energies / projector.total_energy
        kept += shares[1:rank].tolist()
        left += shares[rank:].tolist()
    assert min(kept) >= max(left)


def test_survives_saving(projectors, tmp_path):
    lora = ipa_hf.redistribute_ranks(config(), projectors)
    model = ipa_hf.get_ipa_model(make("llama"), lora, projectors)
    model.save_pretrained(tmp_path)
    again = ipa_hf.load(make("llama"), tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_too_few_rows(projectors):
    with pytest.raises(RankError, match="twice"):
        ipa_hf.redistribute_ranks(config(r=9), projectors)
