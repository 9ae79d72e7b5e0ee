"""Serialization: round trips, and thousands of damaged files."""

import json
import random

import numpy as np
import pytest

from ipa_core import (
    FileFormatError,
    IncrementalPCA,
    fit_projector,
    load,
    load_state,
    save,
    save_state,
)
from ipa_core.io import serialization
from ipa_core.io.file_header import FileFormat
from tests.core.contract import assert_frozen, frozen

X = np.random.default_rng(0).standard_normal((300, 6)).astype("float32")


@pytest.fixture
def projector():
    return fit_projector(X, 3)


def same(first, second):
    arrays = ("components", "mean", "energies")
    return all(np.array_equal(getattr(first, a), getattr(second, a)) for a in arrays) and (
        (first.total_energy, first.samples) == (second.total_energy, second.samples)
    )


def test_projector_round_trip(xp, tmp_path):
    projector = fit_projector(xp.asarray(X), 3)
    save(projector, tmp_path / "p.safetensors")
    again = load(tmp_path / "p.safetensors")
    assert same(again, projector.to(np))
    assert again.components.dtype == np.float32


def test_mapping_round_trip_keeps_sharing(tmp_path, projector):
    other = fit_projector(2 * X[:, :4], 2)
    save({"q": projector, "k": projector, "up": other}, tmp_path / "p.safetensors")
    again = load(tmp_path / "p.safetensors")
    assert list(again) == ["q", "k", "up"]
    assert again["q"] is again["k"]
    assert same(again["up"], other)
    once = {"q": projector, "up": other}
    save(once, tmp_path / "once.safetensors")
    size = [(tmp_path / name).stat().st_size for name in ("p.safetensors", "once.safetensors")]
    assert size[0] - size[1] < 100


def test_state_round_trip(xp, learner_class, tmp_path):
    learner = learner_class(3).update(xp.asarray(np.tile(X, (5, 1))))
    save_state(learner.state_dict(), tmp_path / "s.safetensors")
    again = learner_class(3).load_state_dict(load_state(tmp_path / "s.safetensors", library=xp))
    assert_frozen(again, frozen(learner))
    again.update(xp.asarray(X))


def test_fresh_state_round_trip(tmp_path):
    save_state(IncrementalPCA(2).state_dict(), tmp_path / "s.safetensors")
    again = IncrementalPCA(2).load_state_dict(load_state(tmp_path / "s.safetensors"))
    assert again.features is None


def test_interrupted_write_leaves_the_old_file(tmp_path, projector, monkeypatch):
    path = tmp_path / "p.safetensors"
    save(projector, path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(serialization.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(fit_projector(2 * X, 3), path)
    assert same(load(path), projector)
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


def test_other_kinds_and_versions_are_refused(tmp_path, projector, monkeypatch):
    path = tmp_path / "x.safetensors"
    save(projector, path)
    with pytest.raises(FileFormatError, match="expected format 'ipa-learner-state'"):
        load_state(path)
    monkeypatch.setattr(serialization, "_PROJECTORS", FileFormat("ipa-projectors", 9))
    save(projector, path)
    monkeypatch.undo()
    with pytest.raises(FileFormatError, match="version 1, got '9'; .* update ipa-projectors"):
        load(path)
    from safetensors.numpy import save_file

    save_file({"x": X}, path)
    with pytest.raises(FileFormatError, match="expected format 'ipa-projectors', got None"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("kind", ["projectors", "state"])
def test_damaged_files_never_load_wrong(tmp_path, kind, projector):
    """Flipped, cut, inserted or repeated bytes: an error, or the saved value."""
    path = tmp_path / "x.safetensors"
    if kind == "state":
        learner = IncrementalPCA(3).update(X)
        save_state(learner.state_dict(), path)
    else:
        save({"a": projector, "b": projector}, path)
    good = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(1500):
        path.write_bytes(damaged(good, rng))
        try:
            if kind == "state":
                assert_frozen(IncrementalPCA(3).load_state_dict(load_state(path)), frozen(learner))
            else:
                again = load(path)
                assert list(again) == ["a", "b"]
                assert same(again["a"], projector)
        except FileFormatError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 1400


def damaged(good, rng):
    data = bytearray(good)
    header = 8 + int.from_bytes(good[:8], "little")
    match rng.randrange(6):
        case 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            data[rng.randrange(header)] ^= 1 << rng.randrange(8)
        case 2:
            del data[rng.randrange(len(data)) :]
        case 3:
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        case 4:
            data[:8] = (2 ** rng.randrange(64)).to_bytes(8, "little")
        case 5:
            at = rng.randrange(len(data))
            data[at : at + 16] = rng.randbytes(16)
    return bytes(data)


def test_header_holds_format_and_version(tmp_path, projector):
    path = tmp_path / "p.safetensors"
    save(projector, path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert header["format"] == "ipa-projectors"
    assert header["format_version"] == "1"
