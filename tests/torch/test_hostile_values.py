"""Hostile values for the public callables: only errors of the library leave them.

Errors raised within what a caller passes, such as a model, a callback or an iterator, pass through.
"""

import copy
import inspect
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import ipa_torch
from ipa_core import (
    IPAError,
    RandomizedSVD,
    ReconstructionAutoencoder,
    SettingError,
    ShapeError,
)
from ipa_torch import (
    DampedGradientSketch,
    GradientSketch,
    GradientWeightedInputs,
    HeadLearners,
    LayerProjectors,
    OnlineLearning,
    attach,
    fit_learners,
    fit_projectors,
    list_adapters,
)
from tests import hostile_values
from tests.hostile_values import Opaque, assert_only_our_errors

BATCHES = [torch.linspace(-1, 1, 96).reshape(12, 8).sin()]
ROWS, GRADIENTS = torch.ones(4, 1, 8), torch.ones(4, 1, 3)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


PROJECTORS = fit_projectors(small(), BATCHES, 2, progress=False)


def adapted():
    model = small()
    attach(model, PROJECTORS)
    return model


VALUES = [
    *hostile_values.VALUES,
    np.bool_(True),
    np.ones((4, 5), "float32"),
    np.array([None], dtype=object),
    "\udcff",
    [1],
    {None: None},
    {"0": PROJECTORS["2"]},
    {0: PROJECTORS["0"]},
    [*PROJECTORS.values()],
    PROJECTORS["0"],
    slice(3),
    RandomizedSVD(2),
    torch.ones(3, 5, dtype=torch.int64),
    torch.ones(3, 8, dtype=torch.complex64),
    torch.ones(3, 8, device="meta"),
    torch.eye(8).to_sparse(),
]
KINDS = [int, Opaque, nn.Linear, nn.Sequential(nn.Linear(8, 6, device="meta"))]


def fit(**options):
    settings = {"model": small(), "batches": BATCHES, "rank": 2, "progress": False} | options
    return fit_projectors(**settings)


def learners(**options):
    return fit_learners(small(), BATCHES, 1, progress=False, **options)


def gradients(**options):
    def loss(model, batch):
        return model(batch).square().mean()

    settings = {"model": small(), "batches": BATCHES, "rank": 2, "loss": loss} | options
    return ipa_torch.fit_gradient_projectors(**settings)


def store(folder, **options):
    settings = {"model": small(), "batches": BATCHES, "progress": False} | options
    return ipa_torch.store_activations(folder=folder, **settings)


def load(**options):
    settings = {"model": small(), "state": STATE} | options
    return ipa_torch.load_adapter_state_dict(**settings)


def sketch(kind, **options):
    made = kind(**{"rank": 2} | options)
    made.update(ROWS, GRADIENTS)
    return made


def step(optimizer):
    model = adapted()
    with OnlineLearning(model) as online:
        model(BATCHES[0]).sum().backward()
        online.step(optimizer)


def disabled(model):
    with ipa_torch.disable_adapter(model):
        pass


HEADS = learners(heads=2)["0"]
STATE = ipa_torch.adapter_state_dict(adapted())
MODELS = {
    "fit_projectors": lambda x, _: fit(model=x),
    "fit_gradient_projectors": lambda x, _: gradients(model=x),
    "store_activations": lambda x, path: store(path, model=x),
    "learner_bytes": lambda x, _: ipa_torch.learner_bytes(x, BATCHES[0], 2),
    "select_layers": lambda x, _: ipa_torch.select_layers(x),
    "attach": lambda x, _: attach(x, PROJECTORS),
    "detach": lambda x, _: ipa_torch.detach(x),
    "merge": lambda x, _: ipa_torch.merge(x),
    "unmerge": lambda x, _: ipa_torch.unmerge(x),
    "list_adapters": lambda x, _: list_adapters(x),
    "set_adapter": lambda x, _: ipa_torch.set_adapter(x, None),
    "disable_adapter": lambda x, _: disabled(x),
    "adapter_state_dict": lambda x, _: ipa_torch.adapter_state_dict(x),
    "load_adapter_state_dict": lambda x, _: load(model=x),
    "save_adapter": lambda x, path: ipa_torch.save_adapter(x, path / "adapter"),
    "load_adapter": lambda x, path: ipa_torch.load_adapter(x, path / "adapter"),
    "OnlineLearning": lambda x, _: OnlineLearning(x),
    "attach projectors": lambda x, _: attach(small(), x),
    "LayerProjectors": lambda x, _: LayerProjectors(x),
    "LayerLearners": lambda x, _: repr(ipa_torch.LayerLearners(x)),
    "HeadLearners": lambda x, _: HeadLearners(x),
}
SETTINGS = {
    "fit rank": lambda x, _: fit(rank=x),
    "fit ranks": lambda x, _: fit(rank={"0": x, "2": 1}),
    "fit targets": lambda x, _: fit(targets=x),
    "fit learner": lambda x, _: fit(learner=x),
    "fit row_weights": lambda x, _: fit(row_weights=x),
    "fit row_weights result": lambda x, _: fit(row_weights=lambda batch: x),
    "fit forward": lambda x, _: fit(forward=x),
    "fit max_patches": lambda x, _: fit(max_patches=x),
    "fit stop": lambda x, _: fit(stop=x),
    "fit max_bytes": lambda x, _: fit(max_bytes=x),
    "fit process_group": lambda x, _: fit(process_group=x),
    "fit on_missing": lambda x, _: fit(on_missing=x),
    "fit progress": lambda x, _: fit(progress=x),
    "learners source": lambda x, _: learners(source=x),
    "learners heads": lambda x, _: learners(heads=x),
    "learners learner": lambda x, _: learners(learner=x, heads=2),
    "gradient rank": lambda x, _: gradients(rank=x),
    "gradient learner": lambda x, _: gradients(learner=x),
    "gradient loss": lambda x, _: gradients(loss=x),
    "gradient loss result": lambda x, _: gradients(loss=lambda model, batch: x),
    "gradient max_patches": lambda x, _: gradients(max_patches=x),
    "bytes stop": lambda x, _: ipa_torch.learner_bytes(small(), BATCHES[0], 2, stop=x),
    "bytes learner": lambda x, _: ipa_torch.learner_bytes(small(), BATCHES[0], 2, learner=x),
    "store dtype": lambda x, path: store(path, dtype=x),
    "store max_bytes": lambda x, path: store(path, max_bytes=x),
    "store shard_bytes": lambda x, path: store(path, shard_bytes=x),
    "attach scaling": lambda x, _: attach(small(), PROJECTORS, scaling=x),
    "attach trainable": lambda x, _: attach(small(), PROJECTORS, trainable=x),
    "attach dropout": lambda x, _: attach(small(), PROJECTORS, dropout=x),
    "attach name": lambda x, _: attach(small(), PROJECTORS, adapter_name=x),
    "detach name": lambda x, _: ipa_torch.detach(adapted(), x),
    "merge name": lambda x, _: ipa_torch.merge(adapted(), x),
    "set_adapter name": lambda x, _: ipa_torch.set_adapter(adapted(), x),
    "load state": lambda x, _: load(state=x),
    "load dropout": lambda x, _: load(dropout=x),
    "load name": lambda x, _: load(adapter_name=x),
    "CheckpointConfig folder": lambda x, _: ipa_torch.CheckpointConfig(x),
    "CheckpointConfig seconds": lambda x, _: ipa_torch.CheckpointConfig("folder", seconds=x),
    "StoppingCriteria": lambda x, _: ipa_torch.StoppingCriteria(max_rows=x, max_seconds=x),
    "StoppingCriteria tolerance": lambda x, _: ipa_torch.StoppingCriteria(tolerance=x),
    "StoppingCriteria on_error": lambda x, _: ipa_torch.StoppingCriteria(on_error=x),
    "Online learner": lambda x, _: OnlineLearning(adapted(), learner=x),
    "Online name": lambda x, _: OnlineLearning(adapted(), adapter_name=x),
    "Online scaling": lambda x, _: OnlineLearning(adapted(), scaling=x),
    "Online step": lambda x, _: step(x),
    "Online state": lambda x, _: OnlineLearning(adapted()).load_state_dict(x),
    "GradientSketch rank": lambda x, _: sketch(GradientSketch, rank=x),
    "GradientSketch seed": lambda x, _: sketch(GradientSketch, seed=x),
    "Damped share": lambda x, _: sketch(DampedGradientSketch, input_share=x),
    "Damped learner": lambda x, _: sketch(DampedGradientSketch, learner=x),
    "Weighted learner": lambda x, _: sketch(GradientWeightedInputs, learner=x),
    "Layer reasons": lambda x, _: LayerProjectors(PROJECTORS, missing=x).table(),
    "Layer passes": lambda x, _: LayerProjectors(PROJECTORS, passes=x),
    "Layer truncate": lambda x, _: PROJECTORS.truncate(x),
    "Layer allocate": lambda x, _: PROJECTORS.allocate(x, floor=x),
    "Layer load": lambda x, _: LayerProjectors.load(x),
    "Heads merge": lambda x, _: HEADS.merge(x),
    "Heads update": lambda x, _: copy.copy(HEADS).update(x),
    "Heads state": lambda x, _: copy.copy(HEADS).load_state_dict(x),
    "attention_mask": lambda x, _: ipa_torch.attention_mask(x),
}
SKETCHES = (GradientSketch, DampedGradientSketch, GradientWeightedInputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_models_and_mappings(name, tmp_path):
    assert_only_our_errors(MODELS[name], [None, *VALUES, *KINDS], tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, tmp_path):
    assert_only_our_errors(SETTINGS[name], VALUES, tmp_path)


@pytest.mark.parametrize("kind", SKETCHES)
def test_gradient_sketches(kind, tmp_path):
    known = sketch(kind)
    values = [value for value in (None, *VALUES) if not getattr(value, "is_meta", False)]
    for call in (
        lambda x, _: copy.copy(known).update(x, GRADIENTS),
        lambda x, _: copy.copy(known).update(ROWS, x),
        lambda x, _: known.merge(x),
        lambda x, _: known.merge(RandomizedSVD(2)),
        lambda x, _: copy.copy(known).load_state_dict(x),
    ):
        assert_only_our_errors(call, values, tmp_path)
    for entry in known.state_dict():
        state = dict(known.state_dict())
        del state[entry]
        assert_only_our_errors(lambda x, _, s=state: kind(2).load_state_dict(s), [0], tmp_path)


BATCH_FORMS = [
    None,
    3,
    np.int64(3),
    torch.tensor(2.0),
    "text",
    b"bytes",
    list,
    {"input": BATCHES[0]},
    nn.Sequential(nn.Linear(8, 8)),
]


@pytest.mark.parametrize("batches", BATCH_FORMS, ids=lambda value: type(value).__name__)
def test_what_is_no_stream_of_batches(batches, tmp_path):
    for call in (fit, gradients, lambda batches: store(tmp_path, batches=batches)):
        with pytest.raises(ipa_torch.errors.IPAError, match="expected batches .*into a list"):
            call(batches=batches)


def test_batches_on_the_meta_device_and_models_never_loaded():
    with pytest.raises(IPAError, match="batch with values, got one on the meta device"):
        fit(batches=[torch.ones(3, 8, device="meta")])
    empty = nn.Sequential(nn.Linear(8, 6, device="meta"))
    for call in (fit, gradients):
        with pytest.raises(ipa_torch.LayerError, match="layer '0': .*load the model's weights"):
            call(model=empty)


def test_numbers_of_numpy_are_settings(tmp_path):
    options = {"max_patches": np.int64(9), "rank": np.int64(2), "max_bytes": np.float64(1e9)}
    stop = ipa_torch.StoppingCriteria(tolerance=np.float32(0.5), max_rows=np.int64(20))
    assert fit(**options, stop=stop, checkpoint=tmp_path / "checkpoint")["0"].rank == 2
    options = {"heads": np.int64(2), "max_patches": np.int64(9)}
    assert len(learners(**options, checkpoint=tmp_path / "heads")["0"]) == 2
    assert "0" in store(tmp_path / "store", max_patches=np.int64(9))
    attach(small(), PROJECTORS, scaling=np.float32(0.5), dropout=np.float32(0.1))


def test_huge_numbers():
    """Heads were made one by one, and torch's repetition of batches has a limit."""
    for options in ({}, {"source": "outputs"}, {"max_bytes": 10**30}):
        with pytest.raises(ShapeError, match=f"layer '0': .* {10**30} heads divide, got"):
            learners(heads=10**30, **options)
    stop = ipa_torch.StoppingCriteria(max_batches=2)
    assert fit(learner=partial(ReconstructionAutoencoder, epochs=10**30), stop=stop)["0"].rank == 2


@pytest.mark.parametrize("folder", ["~/activations", "~/checkpoints"])
def test_the_home_folder_is_expanded(monkeypatch, tmp_path, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    store(folder) if "activations" in folder else fit(checkpoint=folder)
    assert (tmp_path / folder[2:]).is_dir()


def test_a_folder_that_cannot_be_made(tmp_path):
    file = tmp_path / "file"
    file.write_text("content")
    for path in (file, file / "below", "/dev/null", "x" * 5000):
        for call in (store, lambda path: fit(checkpoint=path)):
            with pytest.raises(ipa_torch.errors.IPAError, match="expected a folder or a new name"):
                call(path)
    assert file.read_text() == "content"


def test_a_refused_call_leaves_the_model_as_it_was():
    model = adapted()
    before = [parameter.requires_grad for parameter in model.parameters()]
    for call in (
        lambda: attach(model, PROJECTORS, adapter_name="second", dropout="0.1"),
        lambda: attach(model, PROJECTORS, adapter_name="second", trainable="False"),
        lambda: attach(model, {"0": PROJECTORS["0"], "2": None}, adapter_name="second"),
        lambda: ipa_torch.merge(model, ""),
        lambda: ipa_torch.merge(model, 0),
        lambda: ipa_torch.detach(model, ["default"]),
    ):
        with pytest.raises(SettingError):
            call()
        assert list_adapters(model) == ["default"] and model[0].merged is None
        assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_a_learner_of_inputs_is_no_learner_of_gradients():
    with pytest.raises(SettingError, match="partial\\(GradientWeightedInputs, learner"):
        gradients(learner=RandomizedSVD)
    with pytest.raises(SettingError, match="expected the result of learner to be a Learner"):
        fit(learner=GradientSketch)


def test_every_public_callable_is_tried():
    """A new public name has to join a table."""
    source = inspect.getsource(inspect.getmodule(small))
    for name in ipa_torch.__all__:
        assert source.count(name) > 0 or name in ("AdapterLayer", "FitOptions", "PeerError"), name
