"""Files with a digest that matches, and contents that no writer gave them: only our errors."""

import copy
import json
import shutil

import pytest
import torch
from torch import nn

from ipa_core import (
    ActivationStore,
    ExactCovariance,
    FileFormatError,
    IPAError,
    load,
    load_state,
    save,
)
from ipa_core.io import store_index
from ipa_core.io.serialization import pack_state
from ipa_torch import (
    DampedGradientSketch,
    GradientSketch,
    GradientWeightedInputs,
    attach,
    fit_projectors,
    load_adapter,
    store_activations,
)
from ipa_torch._adapters import adapter_file
from ipa_torch._fit.convergence import Convergence

BATCHES = [torch.linspace(-1, 1, 96).reshape(12, 8).sin()]
OTHER = [None, -1, "x", [], {"a": 1}]
_ABSENT = object()


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def places(content, path=()):
    """Yield the keys that lead to each value in a nested content."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    for key, value in content.items() if isinstance(content, dict) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def variants(content):
    """Yield contents in which a value is another or absent."""
    yield from OTHER
    for *path, last in places(content):
        for value in (*OTHER, _ABSENT):
            changed = inner = copy.deepcopy(content)
            for key in path:
                inner = inner[key]
            if value is _ABSENT:
                del inner[last]
            else:
                inner[last] = value
            yield changed


def assert_only_our_errors(call):
    try:
        call()
    except IPAError as error:
        assert str(error)


@pytest.mark.filterwarnings("ignore")
def test_indexes_of_stores(tmp_path):
    def use():
        store = ActivationStore(tmp_path)
        repr(store), store.damaged(), [len(list(layer)) for layer in store.values()]

    store_activations(small(), BATCHES, tmp_path, progress=False)
    index = tmp_path / "index.json"
    whole = json.loads(json.loads(index.read_bytes())["content"])
    for content in variants(whole):
        index.write_text(json.dumps(store_index._FORMAT.seal(content)))
        assert_only_our_errors(use)
        assert_only_our_errors(
            lambda: store_activations(small(), BATCHES, tmp_path, progress=False)
        )
    index.write_text("[" * 100_000)
    with pytest.raises(FileFormatError, match=r"index\.json: expected the index"):
        use()


@pytest.mark.filterwarnings("ignore")
def test_indexes_of_checkpoints(tmp_path):
    folder, saved = tmp_path / "checkpoint", tmp_path / "saved"

    def fit():
        fit_projectors(small(), BATCHES, 2, progress=False, checkpoint=folder)

    fit()
    step = next(folder.glob("step-*"))
    whole = load_state(step / "index.safetensors")
    shutil.copytree(folder, saved)
    for content in variants(whole):
        if isinstance(content, dict):
            (step / "index.safetensors").write_bytes(pack_state(content))
            assert_only_our_errors(fit)
            shutil.rmtree(folder)
            shutil.copytree(saved, folder)


def test_contents_of_adapter_files(tmp_path):
    model, path = small(), tmp_path / "adapter"
    attach(model, fit_projectors(model, BATCHES, 2, progress=False))
    tensors = adapter_file.adapter_state_dict(model, "default")
    raw = adapter_file._bytes(tensors)
    for content in (*OTHER, {"library": 3}, {"library": "ipa_torch", "tensors": 3}):
        path.write_bytes(adapter_file.to_bytes(tensors, adapter_file._FORMAT.seal(content, raw)))
        with pytest.raises(FileFormatError, match=r"adapter: expected"):
            load_adapter(small(), path)


def test_entries_of_a_state_that_no_learner_has():
    state = ExactCovariance(2).update(BATCHES[0]).state_dict()
    rows = state["pending.x"] if "pending.x" in state else BATCHES[0]
    for entries in (
        {"samples": -1},
        {"samples": 1.5},
        {"pending.x": rows, "pending.weights": -torch.ones(len(rows))},
        {"weight": -1.0},
        {"energy": float("nan")},
        {"pending.x": None},
        {"pending.x": rows[0]},
        {"pending.x": rows[:, :3]},
        {"pending.x": rows, "pending.weights": torch.ones(len(rows) + 1)},
    ):
        with pytest.raises(FileFormatError, match="of the state|in the state"):
            ExactCovariance(2).load_state_dict({**state, **entries})


def test_counts_of_a_convergence_that_no_checkpoint_has():
    state = Convergence(0.1).state_dict()
    assert Convergence(0.1).with_state(state)._batches == 0
    for place in (2, 3):
        for value in (1.5, -1.0, float("nan")):
            numbers = state["numbers"].clone()
            numbers[place] = value
            with pytest.raises(FileFormatError, match="expected a count"):
                Convergence(0.1).with_state({**state, "numbers": numbers})


@pytest.mark.parametrize("kind", [GradientSketch, DampedGradientSketch, GradientWeightedInputs])
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e9])
def test_projectors_of_gradients_are_written_and_read(tmp_path, kind, size):
    """The order is that of the gradient: energies may increase."""
    sketch, generator = kind(3), torch.Generator().manual_seed(0)
    for groups in (1, 2):
        x = torch.randn(200, groups, 8, generator=generator) * size
        sketch.update(x, torch.randn(200, groups, 5, generator=generator) * x[..., :5])
    save(sketch.finalize(), tmp_path / "p.safetensors")
    assert load(tmp_path / "p.safetensors").rank == 3
