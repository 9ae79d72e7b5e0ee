"""Sparse rows: learned as the dense ones are, a block at a time."""

import subprocess
import sys

import numpy as np
import pytest
from scipy import sparse

from ipa_core import (
    ExactCovariance,
    IncrementalPCA,
    RandomizedSVD,
    ShapeError,
    StreamError,
    excess_error,
    fit_projector,
    principal_angles,
)
from ipa_core.io import _sparse
from ipa_core.io.streams import iterate


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    scales = np.arange(1, 121) ** -1.0
    return sparse.random_array((3000, 120), density=0.05, rng=rng).tocsr() * scales


def learners():
    for make in (RandomizedSVD, ExactCovariance, IncrementalPCA):
        for center in (False, True):
            yield lambda rank, make=make, center=center: make(rank, center=center)


@pytest.mark.parametrize("make_learner", [*learners()])
@pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil"])
def test_projector_is_that_of_the_dense_rows(rows, make_learner, form):
    dense = fit_projector(rows.toarray(), 6, learner=make_learner)
    learned = fit_projector(rows.asformat(form), 6, learner=make_learner)
    assert float(principal_angles(learned, dense).max()) < 1e-6
    assert learned.samples == 3000


def test_streams_of_sparse_batches_with_weights(rows):
    weights = np.random.default_rng(1).integers(0, 3, 3000).astype(float)
    parts = [
        (rows[start : start + 700], weights[start : start + 700]) for start in range(0, 3000, 700)
    ]
    learned = fit_projector(iter(parts), 6)
    expected = fit_projector([(rows.toarray(), weights)], 6)
    assert float(principal_angles(learned, expected).max()) < 1e-6
    assert learned.samples == np.count_nonzero(weights)
    assert (
        abs(excess_error(learned, parts) - excess_error(expected, [(rows.toarray(), weights)]))
        < 1e-9
    )


def test_blocks_are_bounded(rows, monkeypatch):
    monkeypatch.setattr(_sparse, "_BLOCK_ENTRIES", 120 * 64)
    shapes = [batch.shape for batch, _ in iterate(rows)]
    assert max(shapes) == (64, 120) and sum(shape[0] for shape in shapes) == 3000


def test_matrices_and_arrays_of_old_are_alike(rows):
    assert [b.shape for b, _ in iterate(sparse.csr_matrix(rows))] == [(3000, 120)]
    with pytest.raises(StreamError, match="batch 0"):
        list(iterate([(rows, rows, rows)]))
    with pytest.raises(ShapeError, match=r"weights of shape \(3000,\)"):
        list(iterate([(rows, np.ones(3001))]))


def test_core_does_not_import_scipy():
    program = "import sys, ipa_core; assert not any(m.startswith('scipy') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
