"""Inputs that every learner refuses, without a change of its state."""

import copy
import pickle

import numpy as np
import pytest

import ipa_core
from ipa_core import (
    ArrayTypeError,
    EmptyStreamError,
    ExactCovariance,
    FileFormatError,
    IncrementalPCA,
    IPAError,
    NonFiniteError,
    RandomizedSVD,
    RankError,
    ReconstructionAutoencoder,
    SettingError,
    ShapeError,
    WeightError,
)
from tests.core.contract import assert_frozen, frozen


def rows(xp, *shape, seed=0):
    return xp.asarray(np.random.default_rng(seed).standard_normal(shape))


@pytest.fixture
def learner(xp, learner_class):
    """A learner in mid-stream."""
    return learner_class(3).update(rows(xp, 50, 6))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused_and_nothing_lost(xp, learner, bad):
    batch = np.random.default_rng(1).standard_normal((40, 6))
    batch[3, 2] = bad
    image = frozen(learner)
    with pytest.raises(NonFiniteError, match="in 1 of 40 rows"):
        learner.update(xp.asarray(batch))
    assert_frozen(learner, image)


@pytest.mark.parametrize(
    ("batch", "weights", "error", "words"),
    [
        (np.ones((4, 5)), None, ShapeError, "batches of 6 features"),
        (np.ones((4, 6), dtype=np.int64), None, ArrayTypeError, "floating dtype, got .*int64"),
        (np.ones((4, 6)), np.ones(3), ShapeError, r"weights of shape \(4,\)"),
        (np.ones((4, 6)), np.array([1.0, -1, 1, 1]), WeightError, "at least 0"),
        (np.ones((4, 6)), np.array([1.0, np.nan, 1, 1]), WeightError, "finite weights"),
        (np.float64(1.0) * np.ones(()), None, ShapeError, "features"),
    ],
)
def test_unfit_batches_are_refused(xp, learner, batch, weights, error, words):
    image = frozen(learner)
    with pytest.raises(error, match=words):
        learner.update(xp.asarray(batch), None if weights is None else xp.asarray(weights))
    assert_frozen(learner, image)


def test_lists_and_other_libraries_are_refused(learner_class):
    torch = pytest.importorskip("torch")
    with pytest.raises(ArrayTypeError, match="got list"):
        learner_class(1).update([[1.0, 2.0]])
    learner = learner_class(1).update(np.ones((2, 2)))
    with pytest.raises(ArrayTypeError, match="numpy float64 on cpu, got torch"):
        learner.update(torch.ones(2, 2, dtype=torch.float64))


def test_ranks(learner_class):
    for rank in (0, -1, 2.0, True):
        with pytest.raises(RankError, match="positive integer"):
            learner_class(rank)
    with pytest.raises(RankError, match="at most 3, the number of features, got 4"):
        learner_class(4).update(np.ones((2, 3)))
    assert learner_class(3).update(np.eye(3)).finalize().components.shape == (3, 3)


def test_settings():
    with pytest.raises(SettingError, match="oversample"):
        RandomizedSVD(2, oversample=-1)
    with pytest.raises(SettingError, match="epoch"):
        ReconstructionAutoencoder(2, epochs=0)


def test_nothing_seen(learner_class):
    with pytest.raises(EmptyStreamError, match="at least one row"):
        learner_class(2).finalize()
    empty = learner_class(2).update(np.ones((0, 4))).update(np.ones((3, 4)), np.zeros(3))
    with pytest.raises(EmptyStreamError):
        empty.finalize()


def test_any_leading_shape(xp, learner_class):
    x = rows(xp, 4, 5, 7, 6)
    flat = learner_class(2).update(xp.reshape(x, (140, 6))).finalize()
    deep = learner_class(2).update(x).finalize()
    assert np.array_equal(np.asarray(flat.components), np.asarray(deep.components))
    assert learner_class(2).update(x[0, 0, 0, :]).samples == 1


def test_non_contiguous_and_read_only(learner_class):
    x = np.random.default_rng(0).standard_normal((6, 90))
    x.flags.writeable = False
    strided = learner_class(2).update(x.T).finalize()
    contiguous = learner_class(2).update(np.ascontiguousarray(x.T)).finalize()
    assert np.allclose(strided.components, contiguous.components)


def test_a_batch_may_be_overwritten_afterwards(learner_class):
    x = np.random.default_rng(0).standard_normal((100, 6))
    batch, weights = x.copy(), np.arange(1.0, 101)
    learner = learner_class(2).update(batch, weights)
    batch[:], weights[:] = np.nan, np.nan
    expected = learner_class(2).update(x, np.arange(1.0, 101)).finalize()
    assert np.array_equal(learner.finalize().components, expected.components)


@pytest.mark.parametrize("rank", [50, 64])
def test_a_whole_block_may_be_overwritten_afterwards(learner_class, rank):
    """As many rows as a block has: none waits in a copy. At rank 50 a factor has room for all."""
    learner = learner_class(rank)
    x = np.random.default_rng(0).standard_normal(
        (learner.update(np.zeros((0, 400)))._block_rows, 400)
    )
    learner.update(x)
    before = learner.finalize().components.copy()
    x[:] = 0.0
    np.testing.assert_array_equal(learner.finalize().components, before)


def test_an_update_in_two_halves(xp, learner_class):
    x = np.random.default_rng(0).standard_normal((3000, 40)) / np.arange(1, 41)
    batches = [xp.asarray(part) for part in np.split(x, [1000, 1900, 2950])]
    whole, halves = learner_class(3), learner_class(3)
    for batch in batches:
        whole.update(batch)
        image = frozen(halves)
        pending = halves.begin_update(batch)
        assert_frozen(halves, image)
        assert pending.finish() is halves
    assert_frozen(halves, frozen(whole))


def test_the_second_half_refuses_and_changes_nothing(xp, learner):
    image = frozen(learner)
    pending = learner.begin_update(xp.asarray(np.full((3, 6), np.nan)))
    with pytest.raises(NonFiniteError, match="3 of 3 rows"):
        pending.finish()
    assert_frozen(learner, image)


def test_halves_may_not_cross(learner_class):
    x = np.random.default_rng(0).standard_normal((600, 40))
    for learner in (learner_class(3), learner_class(3).update(x)):
        pending = learner.begin_update(x)
        learner.update(x[:, ::-1])
        image = frozen(learner)
        with pytest.raises(IPAError, match="finish the first one first"):
            pending.finish()
        assert_frozen(learner, image)


def test_an_override_of_update_is_refused():
    with pytest.raises(TypeError, match="expected Custom to override begin_update"):

        class Custom(RandomizedSVD):
            def update(self, batch, weights=None):
                return self


def test_merge_refuses_other_classes_and_settings(learner_class):
    other = IncrementalPCA if learner_class is not IncrementalPCA else RandomizedSVD
    with pytest.raises(SettingError, match="to merge with"):
        learner_class(2).merge(other(2))
    with pytest.raises(SettingError, match="equal rank"):
        learner_class(2).merge(learner_class(3))
    with pytest.raises(SettingError, match="equal center"):
        learner_class(2).merge(learner_class(2, center=True))
    narrow, wide = (learner_class(2).update(np.ones((3, features))) for features in (4, 5))
    with pytest.raises(ShapeError):
        narrow.merge(wide)


def test_load_state_dict_refuses_other_states(learner_class):
    state = learner_class(2).update(np.eye(4)).state_dict()
    with pytest.raises(SettingError, match="rank=3"):
        learner_class(3).load_state_dict(state)
    with pytest.raises(FileFormatError, match="state of a"):
        learner_class(2).load_state_dict({**state, "learner": "Other"})
    incomplete = {key: value for key, value in state.items() if key != "samples"}
    with pytest.raises(FileFormatError, match="samples"):
        learner_class(2).load_state_dict(incomplete)
    bare = {key: value for key, value in state.items() if not hasattr(value, "shape")}
    with pytest.raises(FileFormatError, match="arrays"):
        learner_class(2).load_state_dict(bare)


def test_copies_and_pickles(learner_class):
    learner = learner_class(2).update(np.random.default_rng(0).standard_normal((900, 5)))
    for twin in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert np.array_equal(twin.finalize().components, learner.finalize().components)


def test_gradients_are_left_behind(learner_class):
    torch = pytest.importorskip("torch")
    learner = learner_class(2).update(torch.randn(700, 5, requires_grad=True))
    assert not learner.finalize().components.requires_grad


def test_repr_tells_what_was_seen(learner_class):
    assert repr(learner_class(2)).startswith(
        f"<{learner_class.__name__}(rank=2, center=False, seed=0"
    )
    assert repr(learner_class(2).update(np.eye(4))).endswith(": 4 rows of 4 features>")


def test_guarantee_is_declared(learner_class):
    assert learner_class.guarantee.kind in ("exact", "bounded", "statistical")
    assert (learner_class.guarantee.excess == 0.0) == (learner_class is ExactCovariance)


def test_all_is_exact():
    public = {name for name in vars(ipa_core) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(ipa_core, name)).__name__ == "module"}
    assert set(ipa_core.__all__) == public - modules
    assert ipa_core.__all__ == sorted(ipa_core.__all__)
