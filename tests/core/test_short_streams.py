"""Short, wide, uncentered streams, like the inputs of down projections."""

import numpy as np
import pytest

from ipa_core import fit_projector

from . import oracle

ROWS, FEATURES, LATENT, RANK, BATCH = 1000, 768, 128, 16, 125
#: The target of `benchmarks.short_streams` for 4,000 rows of 3,072 features.
TARGET = 1e-3


def down_projection_inputs(seed):
    """Return GELU of mixed directions of slowly falling energy, with an offset."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((ROWS, LATENT)) * np.arange(1, LATENT + 1) ** -0.35
    hidden = 1.5 * latent @ rng.standard_normal((LATENT, FEATURES)) - 0.8
    hidden += 0.3 * rng.standard_normal((ROWS, FEATURES))
    return (hidden / (1 + np.exp(-1.702 * hidden))).astype("float32")


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("seed", range(3))
def test_excess_error_is_at_the_target(library, seed):
    x = down_projection_inputs(seed)
    convert = pytest.importorskip(library).asarray
    batches = (convert(x[start : start + BATCH]) for start in range(0, ROWS, BATCH))
    components = oracle.span(fit_projector(batches, RANK).components)
    assert 0 <= oracle.excess(oracle.moment(x), components) < TARGET
