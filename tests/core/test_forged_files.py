"""Files with a digest that matches, and values that no learner gives."""

import copy

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipa_core import FileFormatError, Projector, fit_projector, load, save
from ipa_core.errors import NonFiniteError
from ipa_core.io import serialization
from ipa_core.io.serialization import pack_state, unpack_state
from tests.core.conftest import LEARNERS

X = np.random.default_rng(0).standard_normal((40, 5)).astype("float32")
PROJECTOR = fit_projector(X, 2)
PARTS = {part: getattr(PROJECTOR, part) for part in ("components", "mean", "energies")}
NUMBERS = {"total_energy": PROJECTOR.total_energy, "samples": PROJECTOR.samples}


def forged(entries):
    """Return the bytes of a file of projectors with other numbers and arrays."""
    values = {**PARTS, **NUMBERS, **entries}
    content = {"single": True, "projectors": {"": {key: values[key] for key in NUMBERS}}}
    arrays = {f"/{part}": np.asarray(values[part], dtype="float32") for part in PARTS}
    return serialization._pack(serialization._PROJECTORS, content, arrays)


PROJECTORS = [
    ("energies", [1.0, -0.1]),
    ("energies", [-1.0, 0.1]),
    ("energies", [1e3, 1.0]),
    ("energies", [np.nan, 0.1]),
    ("mean", [np.inf, 0, 0, 0, 0]),
    ("components", np.full((2, 5), np.nan)),
    ("total_energy", -1.0),
    ("total_energy", 0.1),
    ("total_energy", "5"),
    ("total_energy", True),
    ("total_energy", None),
    ("samples", -1),
    ("samples", 2.5),
    ("samples", 3.0),
    ("samples", "3"),
    ("samples", True),
]


@pytest.mark.parametrize(("name", "value"), PROJECTORS)
def test_projectors(tmp_path, name, value):
    path = tmp_path / "p.safetensors"
    path.write_bytes(forged({name: value}))
    with pytest.raises(FileFormatError, match=rf"p\.safetensors: projector '': .*{name}"):
        load(path)
    path.write_bytes(forged({}))
    assert np.array_equal(load(path).energies, PROJECTOR.energies)


def test_values_that_no_file_may_have_are_not_written(tmp_path):
    """A file was written, which `load` refused."""
    path = tmp_path / "p.safetensors"
    for name, value in [entry for entry in PROJECTORS if entry[0] == "energies"]:
        impossible = copy.copy(PROJECTOR)
        object.__setattr__(impossible, name, np.asarray(value))
        with pytest.raises(FileFormatError, match=f"projector 'q': expected .*{name}"):
            save({"k": PROJECTOR, "q": impossible}, path)
    assert not path.exists()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2"])
def test_rounded_projectors_are_written_and_read(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    whole = fit_projector(X, 5)
    rounded = whole.to(torch, dtype=getattr(torch, dtype))
    save(rounded, tmp_path / "p.safetensors")
    assert load(tmp_path / "p.safetensors").energies.sum() == pytest.approx(
        whole.total_energy, rel=0.125
    )


@pytest.mark.parametrize("shrunk", [1.0, 1e-10, 1e-15])
def test_rows_beyond_those_that_a_unit_was_chosen_by(learner_class, shrunk):
    """Of lengths that overflowed, `HebbianRule` gave energies of 0."""
    rows = np.random.default_rng(0).standard_normal((3000, 6)).astype("float32")
    learner = learner_class(2).update(rows[:256] * np.float32(shrunk)).update(rows)
    assert learner.finalize().captured() > 0.3


def variants(state):
    """Yield the name of an entry of a state, and a value that no learner gives it."""
    for name, value in state.items():
        if isinstance(value, bool):
            others = [1, 0.0, None, "yes"]
        elif isinstance(value, int):
            others = [value + 0.5, float(value), -1, True, None, "1", float("nan")]
        elif isinstance(value, float):
            others = [-1.0, True, None, "1", float("nan"), float("inf")]
        elif isinstance(value, np.ndarray) and value.size:
            others = [np.full_like(value, wrong) for wrong in (np.nan, np.inf)]
        else:
            others = []
        for other in others:
            yield name, other


@pytest.mark.parametrize("center", [False, True])
def test_states(learner_class, center):
    """Settings are compared with those of the learner, the other entries by their form."""
    rows = np.random.default_rng(1).standard_normal((700, 40)).astype("float32")
    learner = learner_class(3, center=center).update(rows, np.abs(rows[:, 0]))
    state = learner.state_dict()
    entries = {
        name: value for name, value in state.items() if name not in (*learner._settings, "learner")
    }
    tried = set()
    for name, value in variants(entries):
        with pytest.raises(FileFormatError, match=f"'{name}'"):
            learner_class(3, center=center).load_state_dict({**state, name: value})
        tried.add(name)
    assert tried >= entries.keys() - {"template"}
    with pytest.raises(FileFormatError, match="'pending.weights'"):
        wrong = {"pending.x": rows[:2], "pending.weights": -np.ones(2, "float32")}
        learner_class(3, center=center).load_state_dict({**state, **wrong})
    settled = {name: value for name, value in state.items() if "pending" not in name}
    with pytest.raises(FileFormatError, match="'weight'"):
        learner_class(3, center=center).load_state_dict({**settled, "weight": 0.0})


@st.composite
def streams(draw):
    """Draw batches of rows of many sizes and scales, with and without weights."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    features = draw(st.sampled_from([4, 7, 130]))
    batches = []
    for count in draw(st.lists(st.integers(0, 700), min_size=1, max_size=5)):
        kind = draw(st.sampled_from(["normal", "equal", "zero", "one direction", "graded"]))
        rows = rng.standard_normal((count, features))
        if kind == "graded":
            rows = rows * np.logspace(0, -8, features)
        elif kind != "normal":
            rows = {"equal": 1.0, "zero": 0.0, "one direction": rows[:, :1]}[kind] + 0 * rows
        rows = (rows * draw(st.sampled_from([1.0, 1e-12, 1e12]))).astype("float32")
        weights = draw(st.sampled_from([None, "mask", "importances"]))
        drawn = rng.random(count).astype("float32")
        batches.append((rows, {None: None, "mask": drawn > 0.5, "importances": drawn}[weights]))
    return batches


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    batches=streams(),
    kind=st.sampled_from(LEARNERS),
    center=st.booleans(),
    rank=st.integers(1, 4),
)
def test_what_the_library_writes_is_read(batches, kind, center, rank, tmp_path_factory):
    """States at any moment, and the projectors of all learners."""
    learner = kind(rank, center=center)
    path = tmp_path_factory.mktemp("written") / "p.safetensors"
    for rows, weights in batches:
        try:
            learner.update(rows, weights)
        except NonFiniteError:  # an energy beyond float32
            continue
        for state in (learner.state_dict(), learner.compact().state_dict()):
            again = kind(rank, center=center).load_state_dict(unpack_state(pack_state(state)))
            assert again.samples == learner.samples
        if learner.samples:
            projector = learner.finalize()
            save({"whole": projector, "first": projector.truncate(1)}, path)
            assert isinstance(load(path)["first"], Projector)
