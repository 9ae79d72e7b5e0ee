"""A default device of torch that is not the model's: tensors are made where they are needed.

The default device is the meta device here. A tensor that is made without a device has no values
then, and whatever reads it raises.
"""

from functools import partial

import pytest
import torch
from torch import nn

from ipa_core import ExactCovariance, HebbianRule, IncrementalPCA, RandomizedSVD
from ipa_torch import (
    DampedGradientSketch,
    GradientSketch,
    GradientWeightedInputs,
    OnlineLearning,
    StoppingCriteria,
    attach,
    fit_gradient_projectors,
    fit_learners,
    fit_projectors,
    learner_bytes,
    store_activations,
)

from .models import Transformer, decaying, mlp


def padded(count=6):
    mask = torch.ones(8, 30, dtype=torch.long)
    mask[0, 20:] = 0
    return [
        {"input_ids": torch.randint(0, 20, (8, 30)), "attention_mask": mask} for _ in range(count)
    ]


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name].components, second[name].components) for name in first
    )


@pytest.mark.parametrize("learner", [RandomizedSVD, IncrementalPCA, ExactCovariance, HebbianRule])
@pytest.mark.parametrize("center", [False, True])
def test_projectors(learner, center):
    model, batches = Transformer(width=48), padded()
    fit = partial(
        fit_projectors, model, batches, 3, learner=partial(learner, center=center), progress=False,
        stop=StoppingCriteria(tolerance=1e-9),
    )  # fmt: skip
    expected = fit()
    with torch.device("meta"):
        found = fit()
    assert same(found, expected)


def test_convolutions_are_sampled_alike():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    batches = [torch.randn(6, 3, 12, 12) for _ in range(3)]
    weights = torch.rand(6, 10, 10)
    fit = partial(
        fit_projectors, model, batches, 2, max_patches=50, progress=False, targets=["0"],
        row_weights=lambda batch: weights,
    )  # fmt: skip
    torch.manual_seed(0)
    expected = fit()
    torch.manual_seed(0)
    with torch.device("meta"):
        assert same(fit(), expected)


@pytest.mark.parametrize("learner", [GradientSketch, DampedGradientSketch, GradientWeightedInputs])
def test_gradient_projectors(learner):
    model = mlp(12, 16, 4)
    batches = [(decaying(60, 12, seed=i), torch.randint(0, 4, (60,))) for i in range(3)]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    fit = partial(fit_gradient_projectors, model, batches, 2, loss=loss, learner=learner)
    expected = fit()
    with torch.device("meta"):
        assert same(fit(), expected)


def test_adapters_and_online_learning():
    model, batches = Transformer(), padded(2)
    projectors = fit_projectors(model, batches, 2, progress=False)
    with torch.device("meta"):
        attach(model, projectors)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with OnlineLearning(model) as online:
            for batch in batches:
                model(**batch).square().mean().backward()
                optimizer.step()
                lost = online.step(optimizer)
    assert not any(p.is_meta for p in model.parameters()) and all(
        0 <= x <= 1 for x in lost.values()
    )


def test_sizes_learners_checkpoints_and_stores(tmp_path):
    model, batches = Transformer(), padded(4)
    sizes = learner_bytes(model, batches[0], 2)
    with torch.device("meta"):
        assert learner_bytes(model, batches[0], 2) == sizes
        heads = fit_learners(model, batches, source="outputs", heads=2, progress=False)
        for _ in range(2):  # it is read the second time
            fit_projectors(model, batches, 2, checkpoint=tmp_path / "fit", progress=False)
            store = store_activations(model, batches, tmp_path / "store", progress=False)
    assert next(iter(heads.values()))[0].samples == store["attention.0.q"].samples == 4 * 230
