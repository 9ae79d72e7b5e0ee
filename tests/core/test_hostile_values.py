"""Hostile values for every public callable: only errors of the library leave it."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

import ipa_core
from ipa_core import IPAError, Projector, fit_projector, plotting
from tests.core.conftest import LEARNERS

X = np.random.default_rng(0).standard_normal((40, 5)).astype("float32")
PROJECTOR = fit_projector(X, 2)
STATE = ipa_core.RandomizedSVD(2).update(X).state_dict()


WHITENING = PROJECTOR.whitening()
MOMENT = ipa_core.ExactCovariance(2).update(X).moment


class Opaque:
    """An object without any protocol."""


def tensors():
    torch = pytest.importorskip("torch")
    return [
        torch.ones(3, 5),
        torch.ones(3, 5, dtype=torch.int64),
        torch.ones(3, 5).bfloat16(),
        torch.ones(3, 5, dtype=torch.complex64),
        torch.ones(3, 5, requires_grad=True),
        torch.eye(5).to_sparse(),
        torch.ones(3, 5, device="meta"),
        torch.tensor(3),
        torch.float32,
        torch,
    ]


def strict_arrays():
    strict = pytest.importorskip("array_api_strict")
    devices = [strict.Device(name) for name in ("CPU_DEVICE", "device1", "no_float64")]
    return [strict.ones((3, 5), dtype=strict.float32, device=device) for device in devices]


ARRAYS = [
    X,
    X[:, :3],
    X[0],
    X[:0],
    X[:, :0],
    X[0, 0],
    np.float64(1.0),
    np.array(1.0),
    np.full((3, 5), np.nan),
    np.full((3, 5), np.inf),
    np.full((3, 5), 1e300),
    np.ones((3, 5), dtype=">f8"),
    np.ones((3, 5), dtype="longdouble"),
    np.ones((3, 5), dtype="float16"),
    np.ones((3, 5), dtype=complex),
    np.ones((3, 5), dtype=int),
    np.ones((3, 5), dtype=bool),
    np.ones(3, dtype=[("a", "f4")]),
    np.array(["a", "b"]),
    np.array([{}], dtype=object),
    np.array(["2020-01-01"], dtype="datetime64[D]"),
    np.ma.masked_greater(X, 0),
    sparse.csr_matrix(X),
    -np.ones(40),
    np.ones(40),
    *tensors(),
    *strict_arrays(),
]
OTHERS = [
    None,
    True,
    0,
    -1,
    2,
    2.0,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    1j,
    np.int64(2),
    np.bool_(True),
    "",
    "numpy",
    "nul\0",
    "~nobody-of-this-name/x.npy",
    "absent.npy",
    "long" * 100,
    b"bytes",
    Path("/absent/folder/x.npy"),
    np,
    np.float32,
    int,
    object,
    len,
    Opaque,
    Opaque(),
    slice(3),
    PROJECTOR,
    fit_projector(X[:, :3], 2),
    ipa_core.IncrementalPCA(2),
    ipa_core.IncrementalPCA,
    STATE,
    {"learner": "RandomizedSVD"},
    np.random.default_rng(0),
]


def values():
    """Draw hostile values, alone or in lists, tuples, dicts and generators."""
    single = st.sampled_from([*ARRAYS, *OTHERS]).map(lambda value: lambda: value)

    def nested(children):
        items = st.lists(children, max_size=3)
        return st.one_of(
            items.map(lambda parts: lambda: [part() for part in parts]),
            items.map(lambda parts: lambda: tuple(part() for part in parts)),
            items.map(lambda parts: lambda: (part() for part in parts)),
            items.map(lambda parts: lambda: {str(n): part() for n, part in enumerate(parts)}),
        )

    return st.recursive(single, nested, max_leaves=3)


def with_entries(state, key, value):
    """Return a state with an entry that is replaced."""
    return {**state, key: value}


def learner(factory):
    return factory(2).update(X)


def allocate(spectra, budget, floor, cap):
    return ipa_core.allocate_ranks(spectra, budget, floor=floor, cap=cap)


CALLS = {
    "fit_projector": lambda a, b, c: fit_projector(a, b, learner=c),
    "fit_projector stream": lambda a, b, c: fit_projector(a, 2),
    "fit_projector rank": lambda a, b, c: fit_projector(X, a),
    "fit_projector factory": lambda a, b, c: fit_projector(X, 2, learner=a),
    "fit_projector batch": lambda a, b, c: fit_projector([X, (a, b)], 2),
    "fit_projector weights": lambda a, b, c: fit_projector([(X, a)], 2),
    "Projector": lambda a, b, c: Projector(a, b, c, 1.0, 3),
    "Projector numbers": lambda a, b, c: Projector(X[:2], X[0], X[0, :2], a, b),
    "project": lambda a, b, c: PROJECTOR.project(a),
    "reconstruct": lambda a, b, c: PROJECTOR.reconstruct(a),
    "reconstruction_error": lambda a, b, c: PROJECTOR.reconstruction_error(a, b),
    "reconstruction_error weights": lambda a, b, c: PROJECTOR.reconstruction_error(X, a),
    "captured": lambda a, b, c: PROJECTOR.captured(a),
    "truncate": lambda a, b, c: PROJECTOR.truncate(a),
    "to": lambda a, b, c: PROJECTOR.to(a, device=b, dtype=c),
    "to device": lambda a, b, c: PROJECTOR.to(np, device=a, dtype=b),
    "principal_angles": lambda a, b, c: ipa_core.principal_angles(PROJECTOR, a),
    "excess_error": lambda a, b, c: ipa_core.excess_error(PROJECTOR, a),
    "excess_error projector": lambda a, b, c: ipa_core.excess_error(a, X),
    "effective_rank": lambda a, b, c: ipa_core.effective_rank(a),
    "rank_for_energy": lambda a, b, c: ipa_core.rank_for_energy(PROJECTOR, a),
    "rank_for_energy projector": lambda a, b, c: ipa_core.rank_for_energy(a, 0.5),
    "allocate_ranks": lambda a, b, c: allocate({"q": a, "k": b}, 2, 1, None),
    "allocate_ranks spectra": lambda a, b, c: allocate(a, 2, 1, None),
    "allocate_ranks numbers": lambda a, b, c: allocate({"q": [2.0, 1.0]}, a, b, c),
    "load": lambda a, b, c: ipa_core.load(a),
    "load_state": lambda a, b, c: ipa_core.load_state(a),
    "ActivationStore": lambda a, b, c: ipa_core.ActivationStore(a),
    "ActivationStore on_damaged": lambda a, b, c: ipa_core.ActivationStore(".", on_damaged=a),
    "whitening": lambda a, b, c: PROJECTOR.whitening(a, zca=b),
    "Whitening": lambda a, b, c: (WHITENING.whiten(a), WHITENING.unwhiten(b)),
    "damped_cholesky": lambda a, b, c: ipa_core.damped_cholesky(a, b, most_damping=c),
    "damped_cholesky numbers": lambda a, b, c: ipa_core.damped_cholesky(MOMENT, a, most_damping=b),
    "DampedCholesky": lambda a, b, c: ipa_core.damped_cholesky(MOMENT).solve(a),
    "residual": lambda a, b, c: ipa_core.ExactCovariance(2).update(X).residual(a),
    "scree": lambda a, b, c: plotting.scree(a),
    "captured plot": lambda a, b, c: plotting.captured(a),
    "angles": lambda a, b, c: plotting.angles(a),
}
LEARNER_CALLS = {
    "rank": lambda cls, a, b: cls(a),
    "settings": lambda cls, a, b: cls(2, center=a, seed=b),
    "update": lambda cls, a, b: learner(cls).update(a, b),
    "update first": lambda cls, a, b: cls(2).update(a),
    "update weights": lambda cls, a, b: learner(cls).update(X, a),
    "begin_update": lambda cls, a, b: cls(2).begin_update(a, b).finish(),
    "merge": lambda cls, a, b: learner(cls).merge(a),
    "load_state_dict": lambda cls, a, b: cls(2).load_state_dict(a),
}
WRITES = {
    "save": lambda a, path: ipa_core.save(a, path),
    "save named": lambda a, path: ipa_core.save({"q": a, "k": PROJECTOR}, path),
    "save_state": lambda a, path: ipa_core.save_state(a, path),
    "save_state entry": lambda a, path: ipa_core.save_state(with_entries(STATE, "rank", a), path),
}

#: Numbers leave NumPy's warnings of overflow for a caller to see; torch warns of nested tensors.
hostile = pytest.mark.filterwarnings("ignore")
few = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def assert_only_our_errors(call, *arguments):
    try:
        call(*arguments)
    except IPAError as error:
        assert str(error)


@hostile
@pytest.mark.parametrize("name", CALLS)
@given(a=values(), b=values(), c=values())
@few
def test_functions(name, a, b, c):
    assert_only_our_errors(lambda: CALLS[name](a(), b(), c()))


@hostile
@pytest.mark.parametrize("name", LEARNER_CALLS)
@given(a=values(), b=values())
@few
def test_learners(learner_class, name, a, b):
    assert_only_our_errors(lambda: LEARNER_CALLS[name](learner_class, a(), b()))


@hostile
@pytest.mark.parametrize("name", WRITES)
@given(a=values())
@few
def test_writers(name, tmp_path_factory, a):
    path = tmp_path_factory.mktemp("hostile") / "file"
    assert_only_our_errors(lambda: WRITES[name](a(), path))


@hostile
@pytest.mark.parametrize("setting", ["oversample", "epochs"])
@given(a=values())
@few
def test_further_settings(setting, a):
    make = {"oversample": ipa_core.RandomizedSVD, "epochs": ipa_core.ReconstructionAutoencoder}
    assert_only_our_errors(lambda: make[setting](2, **{setting: a()}))


@hostile
@given(data=st.data(), a=values())
@few
def test_entries_of_a_state(learner_class, data, a):
    state = learner(learner_class).state_dict()
    key = data.draw(st.sampled_from(sorted(state)))
    fresh = learner_class(2)
    assert_only_our_errors(lambda: fresh.load_state_dict(with_entries(state, key, a())))


def test_refused_values_leave_a_learner_as_it_was(learner_class):
    known = learner(learner_class)
    for value in (*ARRAYS, *OTHERS):
        before = copy.copy(known)
        try:
            known.update(value)
        except IPAError:
            assert known.samples == before.samples
        known = learner(learner_class)


def test_every_public_callable_is_tried():
    """A new public name has to join the table."""
    tried = " ".join([*CALLS, *WRITES, "load_state", *[cls.__name__ for cls in LEARNERS]])
    values_only = {"Guarantee", "Learner"}
    for name in ipa_core.__all__:
        value = getattr(ipa_core, name)
        if isinstance(value, type) and issubclass(value, IPAError):
            continue
        assert name in values_only or name in tried, name
    assert partial(fit_projector, X)(2).rank == 2
