"""Activations on disk: what is written is read, or named."""

import random
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from ipa_core import ActivationStore, ExactCovariance, fit_projector, principal_angles
from ipa_core.errors import (
    EmptyStreamError,
    FileFormatError,
    NonFiniteError,
    SettingError,
    StreamError,
)
from ipa_torch import LayerError, fit_projectors, store_activations
from tests.scale import runs, store_run


def store(folder, batches, **options):
    options.setdefault("shard_bytes", 20_000)
    return store_activations(
        runs.model(),
        batches,
        folder,
        targets=lambda name, module: hasattr(module, "weight"),
        max_patches=50,
        progress=False,
        **options,
    )


def contents(folder):
    """Return the rows of each layer, to the bit."""
    opened = ActivationStore(folder)
    return {name: np.concatenate([*layer]) for name, layer in opened.items()}


def equal(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_learned_from_a_store_as_from_the_model(tmp_path, dtype):
    batches = runs.batches(10)
    opened = store(tmp_path, batches, dtype=dtype)
    assert opened.index.ended == "the batches ended"
    assert opened.damaged() == {}
    direct = fit_projectors(
        runs.model(),
        batches,
        4,
        targets=lambda name, module: hasattr(module, "weight"),
        max_patches=50,
        learner=ExactCovariance,
        progress=False,
    )
    # Another random choice of patches is made, so the convolution is left to its number of rows.
    assert opened["conv"].samples == direct["conv"].samples == 500
    for name in ("query", "value", "out"):
        for rank in (2, 4):
            learned = fit_projector(opened[name], rank, learner=ExactCovariance)
            whole = direct[name].truncate(rank)
            assert learned.samples == whole.samples == 240
            angles = principal_angles(learned, whole.to(np))
            assert float(angles[-1]) < (1e-3 if dtype == "float16" else 1e-2)


def test_layers_share_what_they_are_given(tmp_path):
    opened = store(tmp_path, runs.batches(6))
    assert opened["query"].shards == opened["value"].shards != opened["out"].shards
    files = {shard.file for layer in opened.values() for shard in layer.shards}
    assert files == {path.name for path in tmp_path.glob("*.safetensors")}
    assert opened.bytes == sum((tmp_path / file).stat().st_size for file in files)


def test_padding_is_left_out_and_weights_are_kept(tmp_path):
    model = nn.Sequential(nn.Linear(6, 3))
    x = torch.randn(4, 5, 6)
    weights = torch.randint(0, 3, (4, 5))
    opened = store_activations(
        model, [x], tmp_path, row_weights=lambda batch: weights, progress=False
    )
    learned = fit_projector(opened["0"], 2, learner=ExactCovariance)
    stored = x.half().float()[weights > 0].numpy()
    wanted = fit_projector([(stored, weights[weights > 0].float().numpy())], 2)
    assert float(principal_angles(learned, wanted)[-1]) < 1e-3
    assert learned.samples == int((weights > 0).sum())


def test_what_the_model_changes_later_is_stored_as_it_was(tmp_path):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8, dtype=torch.float16)

        def forward(self, x):
            x = x * 2
            return x.add_(self.layer(x))

    rows = torch.randn(20, 8).half()
    store = store_activations(Residual(), [rows], tmp_path, progress=False)
    assert np.array_equal(np.concatenate(list(store["layer"])), 2 * rows.numpy())


def test_resuming_and_reading_leave_the_random_state(tmp_path):
    batches = runs.batches(10)

    def interrupted():
        yield from batches[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, interrupted())
    runs.model()  # sets the random state, as `store` does
    before = torch.get_rng_state()
    for _ in range(2):  # it resumes, and then is finished
        assert store(tmp_path, batches).index.ended is not None
        assert torch.equal(torch.get_rng_state(), before)


def test_budget_is_kept(tmp_path):
    whole = store(tmp_path / "whole", runs.batches(10)).bytes
    for share in (0.3, 0.9):
        budget = int(share * whole)
        opened = store(tmp_path / str(share), runs.batches(10), max_bytes=budget)
        files = sum(p.stat().st_size for p in (tmp_path / str(share)).glob("*.safetensors"))
        assert 0.6 * budget < files <= budget
        assert opened.index.ended == f"max_bytes of {budget:,} reached"
        assert 0 < opened.index.batches < 10
    with pytest.raises(SettingError, match="which the first batch takes"):
        store(tmp_path / "small", runs.batches(10), max_bytes=1000)


def test_what_half_precision_cannot_hold_is_refused(tmp_path):
    batch = torch.full((3, 6), 1e5)
    model = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(NonFiniteError, match="layer '0'.*bfloat16"):
        store_activations(model, [batch], tmp_path / "half", progress=False)
    assert store_activations(model, [batch], tmp_path / "wide", dtype="bfloat16", progress=False)


def test_damaged_and_missing_shards(tmp_path):
    store(tmp_path / "good", runs.batches(10))
    good = ActivationStore(tmp_path / "good")
    rng = random.Random(0)
    for number in range(60):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        shard = rng.choice(good["query"].shards)
        victim = tmp_path / "bad" / shard.file
        data = bytearray(victim.read_bytes())
        at = rng.randrange(len(data))
        if number % 3 == 0:
            victim.unlink()
        elif number % 3 == 1:
            victim.write_bytes(data[:at])
        else:
            data[at] ^= 1 << rng.randrange(8)
            victim.write_bytes(data)
        opened = ActivationStore(tmp_path / "bad")
        assert opened.damaged().keys() == {shard.file}
        with pytest.raises(FileFormatError, match=shard.file):
            fit_projector(opened["value"], 2)
        fit_projector(opened["out"], 2)
        lenient = ActivationStore(tmp_path / "bad", on_damaged="skip")
        with pytest.warns(UserWarning, match=f"skipped {shard.rows} rows of 'query'.*{shard.file}"):
            left = fit_projector(lenient["query"], 2)
        assert left.samples == good["query"].samples - shard.rows
        shutil.rmtree(tmp_path / "bad")


def test_damaged_index_is_refused(tmp_path):
    store(tmp_path, runs.batches(3))
    index = tmp_path / "index.json"
    good = index.read_bytes()
    rng = random.Random(0)
    for number in range(200):
        data = bytearray(good)
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        index.write_bytes(data if number % 2 else good[:at])
        with pytest.raises(FileFormatError, match="index.json"):
            ActivationStore(tmp_path)
        with pytest.raises(FileFormatError, match="index.json"):
            store(tmp_path, runs.batches(3))
    index.unlink()
    with pytest.raises(FileNotFoundError):
        ActivationStore(tmp_path)


def test_interrupted_store_goes_on(tmp_path):
    batches, passed = runs.batches(12), []

    def forward(model, x):
        passed.append(0)
        model(x)

    store(tmp_path / "whole", batches)

    def broken():
        yield from batches[:7]
        raise RuntimeError("the loader fails")

    with pytest.raises(RuntimeError, match="loader"):
        store(tmp_path / "parts", broken(), forward=forward)
    held = ActivationStore(tmp_path / "parts")
    assert held.index.ended is None and 0 < held.index.batches <= 7
    passed.clear()
    again = store(tmp_path / "parts", batches, forward=forward)
    assert len(passed) == 12 - held.index.batches
    assert again.index.batches == 12
    assert equal(contents(tmp_path / "parts"), contents(tmp_path / "whole"))
    passed.clear()
    assert store(tmp_path / "parts", batches, forward=forward).index == again.index
    assert not passed
    with pytest.raises(StreamError, match="at least the 12 batches"):
        store(tmp_path / "parts", [], forward=forward)


def test_another_run_is_refused(tmp_path):
    batches = runs.batches(6)

    def broken(parts):
        yield from parts
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store(tmp_path, broken(batches[:4]))
    with pytest.raises(StreamError, match="same order"):
        store(tmp_path, batches[::-1])
    with pytest.raises(SettingError, match="bfloat16"):
        store(tmp_path, batches, dtype="bfloat16")
    with pytest.raises(SettingError, match="skip"):
        ActivationStore(tmp_path, on_damaged="ignore")
    with pytest.raises(StreamError, match=r"ActivationStore\("):
        fit_projector(tmp_path, 2)
    with pytest.raises(KeyError):
        ActivationStore(tmp_path)["absent"]


def test_nothing_to_store(tmp_path):
    with pytest.raises(EmptyStreamError, match="neither empty nor used up"):
        store(tmp_path / "a", [])

    class Skipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    x, everything = torch.randn(3, 4), {"targets": ["used", "unused"], "progress": False}
    with pytest.warns(UserWarning, match="'unused'"):
        assert [*store_activations(Skipped(), [x], tmp_path / "b", **everything)] == ["used"]
    with pytest.raises(LayerError):
        store_activations(Skipped(), [x], tmp_path / "c", targets=["unused"], progress=False)


@pytest.mark.slow
def test_kill_at_any_moment(tmp_path):
    """A run that is killed by -9 three times equals an uninterrupted run."""
    folder = tmp_path / "killed"
    for kills in range(3):
        process = runs.start("store_run", folder)
        wanted = 2 + 9 * kills
        runs.until(lambda wanted=wanted: len([*folder.glob("*.safetensors")]) > wanted, process)
        runs.kill(process)
        if (folder / "index.json").exists():
            assert ActivationStore(folder).damaged() == {}
    process = runs.start("store_run", folder)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    store_run.main(tmp_path / "whole", pause=0)
    assert equal(contents(folder), contents(tmp_path / "whole"))
    named = {s.file for layer in ActivationStore(folder).values() for s in layer.shards}
    assert {path.name for path in folder.iterdir()} == named | {"index.json", ".lock"}
