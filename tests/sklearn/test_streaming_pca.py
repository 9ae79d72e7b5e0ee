"""StreamingPCA beside scikit-learn's PCA: attributes, weights, shares, batches, libraries."""

import doctest
import os
import pickle
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sklearn.decomposition
from scipy import sparse
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ipa_core import (
    ExactCovariance,
    IPAError,
    RandomizedSVD,
    RankError,
    ReconstructionAutoencoder,
    SettingError,
)
from ipa_sklearn import StreamingPCA
from tests.test_documents import bare_names, examples

ATTRIBUTES = (
    "components_",
    "explained_variance_",
    "explained_variance_ratio_",
    "mean_",
    "n_components_",
    "noise_variance_",
    "singular_values_",
)


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return rng.standard_normal((400, 30)) @ rng.standard_normal((30, 30)) + 5.0


@pytest.mark.parametrize("n_components", [1, 6, 30, None, 0.5, 0.95, np.int64(3), np.float64(0.7)])
def test_attributes_are_those_of_pca(rows, n_components):
    ours = StreamingPCA(n_components).fit(rows)
    theirs = PCA(n_components, svd_solver="full").fit(rows)
    for name in ATTRIBUTES:
        np.testing.assert_allclose(
            getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-8, err_msg=name
        )
    assert ours.n_samples_seen_ == 400 and ours.n_features_in_ == 30


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("n_components", [4, 30])
def test_methods_are_those_of_pca(rows, n_components, whiten):
    ours = StreamingPCA(n_components, whiten=whiten).fit(rows)
    theirs = PCA(n_components, whiten=whiten, svd_solver="full").fit(rows)
    z = theirs.transform(rows)
    np.testing.assert_allclose(ours.transform(rows), z, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        ours.inverse_transform(z), theirs.inverse_transform(z), rtol=1e-6, atol=1e-6
    )
    # The likelihood is that of X; the covariance of a PCA that whitens is of neither X nor Z.
    plain = PCA(n_components, svd_solver="full").fit(rows)
    np.testing.assert_allclose(ours.score_samples(rows), plain.score_samples(rows), rtol=1e-6)
    assert ours.score(rows) == pytest.approx(plain.score(rows), rel=1e-8)
    np.testing.assert_allclose(ours.get_covariance(), theirs.get_covariance(), rtol=1e-6)


def test_batches_and_the_whole_are_learned_alike(rows):
    whole = StreamingPCA(5).fit(rows)
    cut = StreamingPCA(5, batch_size=33).fit(rows)
    parts = StreamingPCA(5)
    for start in range(0, 400, 80):
        parts.partial_fit(rows[start : start + 80])
    for other in (cut, parts):
        for name in ATTRIBUTES:
            np.testing.assert_allclose(getattr(other, name), getattr(whole, name), rtol=1e-8)


def test_attributes_follow_every_partial_fit(rows):
    pca = StreamingPCA(5).partial_fit(rows[:100])
    first = pca.mean_
    pca.partial_fit(rows[100:])
    assert "mean_" not in vars(pca)  # decomposed on demand only
    np.testing.assert_allclose(pca.mean_, rows.mean(0))
    assert not np.allclose(first, pca.mean_)
    assert not hasattr(pca, "no_such_attribute_")


def test_weights_count_rows(rows):
    weights = np.random.default_rng(1).integers(0, 4, 400)
    weighted = StreamingPCA(5).fit(rows, sample_weight=weights)
    repeated = PCA(5, svd_solver="full").fit(rows.repeat(weights, axis=0))
    for name in ATTRIBUTES:
        np.testing.assert_allclose(
            getattr(weighted, name), getattr(repeated, name), rtol=1e-6, err_msg=name
        )
    assert weighted.n_samples_seen_ == np.count_nonzero(weights)
    parts = StreamingPCA(5)
    for part in (slice(0, 100), slice(100, 400)):
        parts.partial_fit(rows[part], sample_weight=weights[part])
    np.testing.assert_allclose(parts.explained_variance_, weighted.explained_variance_)


@pytest.mark.parametrize("container", [sparse.csr_matrix, sparse.csc_array, sparse.lil_array])
def test_sparse_rows_are_never_dense_as_a_whole(container, monkeypatch):
    dense = sparse.random_array((500, 40), density=0.1, rng=np.random.default_rng(2)).toarray()
    dense[:, 0] += 1.0  # the mean matters
    made = []
    toarray = sparse.csr_array.toarray
    for kind in (sparse.csr_array, sparse.csr_matrix):
        monkeypatch.setattr(
            kind, "toarray", lambda rows: made.append(rows.shape[0]) or toarray(rows)
        )
    pca = StreamingPCA(5, batch_size=64).fit(container(dense))
    expected = PCA(5, svd_solver="full").fit(dense)
    np.testing.assert_allclose(pca.explained_variance_, expected.explained_variance_, rtol=1e-6)
    fitted = len(made)
    z = pca.transform(container(dense))
    assert isinstance(z, np.ndarray) and len(made) == fitted and max(made) == 64
    np.testing.assert_allclose(z, expected.transform(dense), atol=1e-6)


def test_learners_are_exchangeable(rows):
    exact = StreamingPCA(4).fit(rows)
    for learner in (ExactCovariance, partial(ReconstructionAutoencoder, epochs=3)):
        pca = StreamingPCA(4, learner=learner).fit(rows)
        assert pca.n_samples_seen_ == 400
        np.testing.assert_allclose(
            pca.explained_variance_.sum(), exact.explained_variance_.sum(), rtol=0.05
        )
    several = StreamingPCA(4, learner=partial(ReconstructionAutoencoder, epochs=3))
    with pytest.raises(SettingError, match="one pass"):
        several.partial_fit(rows)


@pytest.mark.parametrize("wrong", [0, -1, 1.0, 1.5, 0.0, "two", True, float("nan")])
def test_components_that_are_none_are_refused(rows, wrong):
    with pytest.raises(RankError, match=r"n_components|share"):
        StreamingPCA(wrong).fit(rows)


def test_wrong_calls_name_their_cure(rows):
    with pytest.raises(RankError, match="at most 30"):
        StreamingPCA(31).fit(rows)
    with pytest.raises(RankError, match="number of samples 4"):
        StreamingPCA(5).fit(rows[:4])
    with pytest.raises(SettingError, match="more than 1"):
        StreamingPCA(2).fit(rows, sample_weight=np.full(400, 1 / 400))
    with pytest.raises(SettingError, match="batch_size"):
        StreamingPCA(2, batch_size=0).fit(rows)
    with pytest.raises(ValueError, match="sample_weight"):
        StreamingPCA(2).fit(rows, sample_weight=np.ones(7))
    pca = StreamingPCA(5).partial_fit(rows)
    with pytest.raises(SettingError, match="n_components=5"):
        pca.set_params(n_components=6).partial_fit(rows)


def test_what_fails_leaves_the_estimator_as_it_was(rows):
    fresh = StreamingPCA(2)
    with pytest.raises(IPAError):
        fresh.partial_fit(np.full((5, 3), 1e-200))
    with pytest.raises(NotFittedError):
        fresh.transform(rows[:, :3])
    pca = StreamingPCA(2).partial_fit(rows)
    before = pca.n_samples_seen_, pca.explained_variance_
    with pytest.raises(IPAError):
        pca.partial_fit(np.full((5, 30), 1e-200))
    assert pca.n_samples_seen_ == before[0]
    np.testing.assert_array_equal(pca.explained_variance_, before[1])


def test_one_row_has_no_variance_yet(rows):
    pca = StreamingPCA(1).partial_fit(rows[:1])
    assert np.isnan(pca.explained_variance_).all()
    np.testing.assert_array_equal(pca.mean_, rows[0])
    pca.partial_fit(rows[1:])
    np.testing.assert_allclose(pca.explained_variance_, PCA(1).fit(rows).explained_variance_)


def test_constant_rows_have_no_variance():
    pca = StreamingPCA(2).fit(np.full((10, 3), 7.0))
    np.testing.assert_array_equal(pca.explained_variance_ratio_, 0.0)
    np.testing.assert_array_equal(pca.transform(np.full((1, 3), 7.0)), 0.0)


def test_float32_stays_float32(rows):
    pca = StreamingPCA(3, whiten=True).fit(rows.astype(np.float32))
    assert pca.components_.dtype == pca.transform(rows.astype(np.float32)).dtype == np.float32
    np.testing.assert_allclose(
        pca.explained_variance_, PCA(3).fit(rows).explained_variance_, rtol=1e-4
    )


def test_copies_and_pipelines_go_on(rows):
    pca = StreamingPCA(3).partial_fit(rows[:200])
    again = pickle.loads(pickle.dumps(pca)).partial_fit(rows[200:])
    np.testing.assert_allclose(again.mean_, rows.mean(0))
    assert not hasattr(clone(again), "components_")
    piped = make_pipeline(StandardScaler(), StreamingPCA(3)).fit(rows)
    assert list(piped.get_feature_names_out()) == [f"streamingpca{i}" for i in range(3)]


def test_arrays_stay_in_their_library():
    pytest.importorskip("torch")
    program = """
import numpy as np, sklearn, torch
from sklearn.decomposition import PCA
from ipa_sklearn import StreamingPCA
x = torch.randn(300, 20, generator=torch.Generator().manual_seed(0)) + 3
weights = torch.arange(300) % 3
with sklearn.config_context(array_api_dispatch=True):
    pca = StreamingPCA(4, whiten=True).fit(x, sample_weight=weights)
    for batch in x.split(100):
        pca.partial_fit(batch, sample_weight=np.ones(100))
    z = pca.transform(x)
    for value in (pca.components_, pca.mean_, pca.explained_variance_, z, pca.score_samples(x)):
        assert isinstance(value, torch.Tensor) and value.dtype == torch.float32, type(value)
    assert pca.inverse_transform(z).shape == x.shape and isinstance(pca.score(x), float)
counts = torch.cat([weights + 1]).numpy()
theirs = PCA(4).fit(x.numpy().repeat(counts, axis=0))
np.testing.assert_allclose(pca.explained_variance_.numpy(), theirs.explained_variance_, rtol=1e-3)
"""
    environment = os.environ | {
        "SCIPY_ARRAY_API": "1",
        "PYTHONPATH": os.pathsep.join(str(path) for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_example_of_incremental_pca_runs_with_one_line_changed():
    text = sklearn.decomposition.IncrementalPCA.__doc__
    line = "from sklearn.decomposition import IncrementalPCA"
    assert text.count(line) == 1
    text = text.replace(line, "from ipa_sklearn import StreamingPCA as IncrementalPCA")
    text = re.sub(r"^(\s+)IncrementalPCA\(batch", r"\1StreamingPCA(batch", text, flags=re.MULTILINE)
    parsed = doctest.DocTestParser().get_doctest(text, {}, "IncrementalPCA", None, 0)
    assert len(parsed.examples) > 5
    assert doctest.DocTestRunner().run(parsed).failed == 0


def test_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = Path("docs/sklearn.md")
    blocks = examples(page)
    assert blocks
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "page"})
    assert capsys.readouterr().out


def test_public_names_have_docstring_example_and_types():
    assert not bare_names("ipa_sklearn")


@pytest.mark.parametrize(
    "setting",
    [
        {"whiten": "no"},
        {"whiten": np.nan},
        {"copy": 2},
        {"batch_size": True},
        {"batch_size": 1.5},
        {"learner": None},
        {"learner": "RandomizedSVD"},
        {"learner": ExactCovariance(2)},
        {"learner": lambda rank, center: None},
        {"learner": partial(RandomizedSVD, absent=1)},
    ],
)
def test_wrong_settings_are_refused_and_a_retry_works(rows, setting):
    pca = StreamingPCA(2, **setting)
    calls = [pca.fit] if "batch_size" in setting else [pca.fit, pca.partial_fit]
    for call in calls:
        with pytest.raises(SettingError, match=r"expected .*, got"):
            call(rows)
    valid = {"whiten": False, "copy": True, "batch_size": None, "learner": RandomizedSVD}
    pca.set_params(**{name: valid[name] for name in setting}).fit(rows)
    assert pca.n_samples_seen_ == len(rows)
