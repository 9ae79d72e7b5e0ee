"""Excess error on real activations: MiniLM's inputs of 384 and 1536 features, rank 16, one pass."""

from functools import partial

import numpy as np
import pytest

from ipa_core import (
    ExactCovariance,
    HebbianRule,
    IncrementalPCA,
    RandomizedSVD,
    ReconstructionAutoencoder,
    fit_projector,
)

pytestmark = pytest.mark.assets

RANK = 16
BOUNDS = {
    ExactCovariance: 1e-6,
    IncrementalPCA: 3e-4,
    RandomizedSVD: 3e-4,
    HebbianRule: 1e-2,
    ReconstructionAutoencoder: 5e-3,
    partial(ReconstructionAutoencoder, epochs=5): 2e-3,
}


@pytest.fixture(scope="module")
def inputs():
    """200 batches of real inputs of two layers, from one pass of the model."""
    pytest.importorskip("transformers")
    from benchmarks.activations import DOWN, UP, minilm_inputs

    batches = list(minilm_inputs([UP, DOWN], 200, size=12))
    return {"up": [seen[UP] for seen in batches], "down": [seen[DOWN] for seen in batches]}


@pytest.fixture(scope="module", params=["up", "down"])
def judged(request, inputs):
    """Batches of a layer, and their float64 second moment."""
    batches = [batch.numpy() for batch in inputs[request.param]]
    oracle = ExactCovariance(RANK)
    for batch in batches:
        oracle.update(batch.astype(np.float64))
    return batches, oracle


@pytest.mark.parametrize(
    "learner_class", BOUNDS, ids=lambda factory: getattr(factory, "__name__", "epochs")
)
def test_excess_error(judged, learner_class):
    batches, oracle = judged
    best = oracle.residual(oracle.finalize())
    projector = fit_projector(batches, RANK, learner=learner_class)
    assert oracle.residual(projector) / best - 1 < BOUNDS[learner_class]
