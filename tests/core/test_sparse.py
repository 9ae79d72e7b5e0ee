"""Sparse rows: learned as the dense ones are, a block at a time."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from scipy import sparse

from ipa_core import (
    ArrayTypeError,
    ExactCovariance,
    IncrementalPCA,
    NonFiniteError,
    RandomizedSVD,
    ShapeError,
    StreamError,
    excess_error,
    fit_projector,
    load_state,
    principal_angles,
    save_state,
)
from ipa_core.io import _sparse_blocks
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
    weights, rows = np.random.default_rng(1).integers(0, 3, 3000).astype(float), rows.tocsr()
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
    monkeypatch.setattr(_sparse_blocks, "_BLOCK_ENTRIES", 120 * 64)
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


@pytest.mark.parametrize("make_learner", [*learners()])
@pytest.mark.parametrize("cut", [1, 130, 1000, 3000])
def test_learners_take_sparse_batches(wide, make_learner, cut):
    weights = np.random.default_rng(2).integers(0, 3, wide.shape[0]).astype(float)
    dense, learned = make_learner(6), make_learner(6)
    first = 40 if cut == 1 else wide.shape[0]
    for start in range(0, first, cut):
        part = slice(start, start + cut)
        dense.update(wide[part].toarray(), weights[part])
        learned.update(wide[part], weights[part])
    learned, dense = learned.finalize(), dense.finalize()
    assert learned.samples == dense.samples
    assert float(principal_angles(learned, dense).max()) < 1e-4
    assert learned.captured() == pytest.approx(dense.captured(), abs=1e-6)


@pytest.fixture
def wide():
    """More features than a learner keeps an exact moment of; a late change and heavy rows."""
    rng = np.random.default_rng(3)
    rows = sparse.random_array((3000, 400), density=0.03, rng=rng).tolil()
    rows[1700:, 300:320] = 3 * rng.random((1300, 20))
    rows[[50, 900, 2500], 399] = 40.0
    return (rows.tocsr() * np.arange(1, 401) ** -0.3).tocsr()


def test_sparse_products_are_of_sparse_rows(wide, monkeypatch):
    dense = []
    original = sparse.csr_array.toarray
    monkeypatch.setattr(
        sparse.csr_array, "toarray", lambda x, *a: dense.append(x.shape[0]) or original(x, *a)
    )
    fit_projector(wide, 6)
    assert max(dense) <= 128


def test_memory_is_that_of_some_sketches():
    """The state of the learner is 3.25 k x features numbers; k is 64 at rank 26."""
    rng = np.random.default_rng(0)
    matrix = sparse.random_array((9000, 15000), density=1e-3, rng=rng, dtype=np.float32).tocsr()
    fit_projector(matrix[:300], 26)
    tracemalloc.start()
    try:
        fit_projector(matrix, 26)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8.5 * 64 * matrix.shape[1] * 4


def test_sparse_rows_may_be_overwritten_afterwards(wide):
    for count in (100, 128):
        rows = wide[:count].copy()
        learner = RandomizedSVD(50).update(rows)
        before = learner.finalize().components
        rows.data[:] = 0.0
        np.testing.assert_array_equal(learner.finalize().components, before)


def test_entries_that_repeat_are_added(rows):
    rows = rows.tocsr()
    coo = rows.tocoo()
    halves = sparse.csr_array(
        (np.r_[coo.data, coo.data] / 2, (np.r_[coo.row, coo.row], np.r_[coo.col, coo.col])),
        shape=coo.shape,
    )
    split = sparse.csr_array((3000, 120))
    order = np.argsort(np.r_[coo.row, coo.row], kind="stable")
    split.data, split.indices = np.r_[coo.data, coo.data][order] / 2, np.r_[coo.col, coo.col][order]
    split.indptr = 2 * rows.indptr
    before = split.data.copy()
    for matrix in (halves, split):
        learned = RandomizedSVD(6).update(matrix).finalize()
        expected = fit_projector(rows.toarray(), 6)
        assert learned.captured() == pytest.approx(expected.captured(), abs=1e-9)
    assert (split.data == before).all() and not split.has_canonical_format


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda x: x.astype(np.int64), ArrayTypeError),
        (lambda x: x * np.inf, NonFiniteError),
        (lambda x: x * 1e-200, NonFiniteError),
        (lambda x: x[:, :100], ShapeError),
    ],
)
def test_sparse_batches_are_checked(wide, spoil, error):
    learner = RandomizedSVD(6).update(wide[:500])
    state = repr(learner.state_dict())
    with pytest.raises(error):
        learner.update(spoil(wide[500:]).tocsr())
    assert repr(learner.state_dict()) == state


def test_a_learner_of_sparse_rows_is_saved(wide, tmp_path):
    learner = RandomizedSVD(6).update(wide[:1001])
    save_state(learner.state_dict(), tmp_path / "state.safetensors")
    resumed = RandomizedSVD(6).load_state_dict(load_state(tmp_path / "state.safetensors"))
    first, second = (one.update(wide[1001:]).finalize() for one in (learner, resumed))
    assert (first.components == second.components).all()
