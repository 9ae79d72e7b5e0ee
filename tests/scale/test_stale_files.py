"""Checkpoints and stores of another model, run, layer or process are refused, not taken up."""

import collections
import dataclasses
import json
import shutil
import threading
import types
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from ipa_core import ActivationStore
from ipa_core.errors import FileFormatError, SettingError, StreamError
from ipa_core.io import store_index
from ipa_torch import CheckpointConfig, StoppingCriteria, fit_projectors, store_activations
from ipa_torch._fit import checkpoint as checkpoint_module
from ipa_torch._fit.code_digest import code_digest
from ipa_torch._fit.folder_lock import lock_folder
from tests.scale import runs

DATA = [torch.randn(32, 16, generator=torch.Generator().manual_seed(i)) for i in range(6)]


def two(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def fit(model, folder, batches=DATA, **options):
    options.setdefault("checkpoint", CheckpointConfig(folder, batches=2))
    return fit_projectors(model, batches, 4, progress=False, **options)


def store(model, folder, batches=DATA, **options):
    return store_activations(model, batches, folder, progress=False, **options)


def changed(part):
    model = two()
    if part == "weight":
        model[0].weight.data[3, 5] += 1e-6
    elif part == "bias":
        model[0].bias.data.zero_()
    elif part == "dtype":
        model.double()
    return model


@pytest.mark.parametrize("run", [fit, store])
@pytest.mark.parametrize("part", ["weight", "bias", "dtype"])
def test_weights_that_the_inputs_depend_on_are_compared(tmp_path, run, part):
    run(two(), tmp_path)
    batches = [batch.double() for batch in DATA] if part == "dtype" else DATA
    with pytest.raises(SettingError, match=r"got other values of '0\.(weight|bias)'"):
        run(changed(part), tmp_path, batches)
    run(two(), tmp_path)


@pytest.mark.parametrize("run", [fit, store])
def test_weights_behind_the_last_target_may_be_others(tmp_path, run):
    run(two(), tmp_path)
    model = two()
    nn.init.normal_(model[2].weight)  # a head that each process initializes anew
    run(model, tmp_path)


class UncalledParts(nn.Module):
    """Parts that are read without a call, a buffer, and a part behind the targets."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Linear(16, 16)
        self.body = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 4)])
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("cache", torch.randn(seed + 1), persistent=False)
        torch.manual_seed(seed)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(torch.nn.functional.linear(x, self.table.weight))
        for layer in self.body:
            x = layer(x)
        return self.head(x)


def test_weights_that_are_read_without_a_call_and_buffers_are_compared(tmp_path):
    targets = ["body.0", "body.1"]
    fit(UncalledParts(0), tmp_path, targets=targets)
    fit(UncalledParts(1), tmp_path, targets=targets)
    for name in ("table.weight", "norm.running_mean"):
        model = UncalledParts(0)
        model.state_dict()[name].add_(1)
        with pytest.raises(SettingError, match=name):
            fit(model, tmp_path, targets=targets)


def halved(batch):
    return torch.full((len(batch),), 0.5)


@pytest.mark.parametrize("run", [fit, store])
@pytest.mark.parametrize(
    "options",
    [
        {"row_weights": halved},
        {"row_weights": lambda batch: torch.ones(len(batch))},
        {"row_weights": partial(lambda batch, w: torch.full((len(batch),), w), w=2.0)},
        {"row_weights": None},
        {"forward": lambda model, batch: model(2 * batch)},
        {"forward": types.MethodType(lambda self, model, batch: model(batch), object())},
        {"max_patches": 3},
    ],
)
def test_other_callables_and_settings_are_refused(tmp_path, run, options):
    run(two(), tmp_path)
    with pytest.raises(SettingError, match="settings"):
        run(two(), tmp_path, **options)


def test_code_of_callables_is_compared_not_their_variables():
    def weights(value):
        return lambda batch: value

    assert code_digest(weights(1)) == code_digest(weights(2))
    assert code_digest(partial(max, 1)) != code_digest(partial(max, 2))
    assert code_digest(max) != code_digest(min)

    class Weights:
        def __call__(self, batch):
            return None

    class Others(Weights):
        def __call__(self, batch):
            return batch

    assert code_digest(Weights()) == code_digest(Weights()) != code_digest(Others())


@dataclasses.dataclass
class Batch:
    x: torch.Tensor


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Graph:
    def __init__(self, x):
        self.x, self.whole = x, self  # with a circle


Pair = collections.namedtuple("Pair", "x y")


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("run", [fit, store])
@pytest.mark.parametrize(
    "make",
    [
        Batch,
        Slots,
        Graph,
        lambda x: Pair(x, None),
        lambda x: types.SimpleNamespace(x=x),
        lambda x: collections.UserDict(x=x),
        lambda x: {"x": {float(v) for v in x[0]}, "dense": x},
        lambda x: x.numpy().astype(">f8"),
        lambda x: Batch(x.to_sparse()),
        lambda x: Batch(x.to_sparse_csr()),
        lambda x: Batch(torch.nested.nested_tensor([x, x[:3]], layout=torch.jagged)),
        lambda x: Batch(nn.utils.rnn.pack_padded_sequence(x[None], [32], batch_first=True)),
    ],
)
def test_batches_of_any_class_are_compared(tmp_path, run, make):
    def forward(model, batch):
        model(DATA[0])

    first, others = ([make(x) for x in data] for data in (DATA[:3], DATA[3:]))
    run(two(), tmp_path, first, forward=forward)
    run(two(), tmp_path, [make(x.clone()) for x in DATA[:3]], forward=forward)
    with pytest.raises(StreamError, match="got others"):
        run(two(), tmp_path, others, forward=forward)


def test_batch_that_cannot_be_digested_is_reported(tmp_path):
    batches = [Slots(threading.Lock()) for _ in range(2)]
    with pytest.warns(UserWarning, match="a lock that cannot be pickled"):
        fit(two(), tmp_path, batches, forward=lambda model, batch: model(DATA[0]))


def test_finished_store_of_other_batches_is_refused(tmp_path):
    store(two(), tmp_path)
    with pytest.raises(StreamError, match="others"):
        store(two(), tmp_path, [9 * batch for batch in DATA])
    with pytest.raises(StreamError, match="at least the 6"):
        store(two(), tmp_path, DATA[:2])


@pytest.mark.parametrize("source", ["layer", "step", "run", "convergence"])
def test_files_of_another_layer_step_or_run_are_refused(tmp_path, source):
    options = {"stop": StoppingCriteria(tolerance=1e-6)}
    fit(two(), tmp_path / "a", **options)
    last, before = (tmp_path / "a" / f"step-000000000{step}" for step in (6, 4))
    if source == "layer":
        first, second = last / "0.learner.safetensors", last / "1.learner.safetensors"
        kept = first.read_bytes()
        shutil.copy(second, first)
        second.write_bytes(kept)
    elif source == "step":
        shutil.copy(before / "1.learner.safetensors", last)
    elif source == "run":
        other = two(1)
        fit(other, tmp_path / "b", **options)
        shutil.copy(tmp_path / "b" / last.name / "1.learner.safetensors", last)
    else:
        shutil.copy(before / "1.convergence.safetensors", last)
    with pytest.raises(FileFormatError, match="index's digest"):
        fit(two(), tmp_path / "a", **options)


def test_whole_step_under_the_name_of_another_is_refused(tmp_path):
    fit(two(), tmp_path)
    shutil.rmtree(tmp_path / "step-0000000006")
    (tmp_path / "step-0000000004").rename(tmp_path / "step-0000000005")
    with pytest.raises(FileFormatError, match="the checkpoint of 4 batches"):
        fit(two(), tmp_path)


@pytest.mark.parametrize("run", [fit, store])
def test_folder_in_use_is_refused_with_the_holder(tmp_path, run):
    with lock_folder(tmp_path):
        with pytest.raises(SettingError, match=r"another run writes to \(process \d+ on .+ since"):
            run(two(), tmp_path)
    run(two(), tmp_path)


def test_folder_of_a_killed_process_is_free(tmp_path):
    process = runs.start("fit_run", tmp_path)
    runs.until(lambda: list((tmp_path / "checkpoints").glob("step-*")), process)
    with pytest.raises(SettingError, match=f"process {process.pid} on"):
        with lock_folder(tmp_path / "checkpoints"):
            pass
    runs.kill(process)
    with lock_folder(tmp_path / "checkpoints"):
        pass


@pytest.mark.parametrize("moment", ["first", "last"])
def test_result_outlives_a_last_checkpoint_that_cannot_be_written(tmp_path, monkeypatch, moment):
    write = checkpoint_module.replace_file

    def full(path, data):
        if moment == "first" or "writing" in str(path) and list(tmp_path.glob("step-*4")):
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint_module, "replace_file", full)
    every = 100 if moment == "first" else 2
    batches = DATA[:5]
    with pytest.warns(UserWarning, match="No space left.*save the result"):
        found = fit(two(), tmp_path, batches, checkpoint=CheckpointConfig(tmp_path, batches=every))
    assert runs.same(found, fit(two(), tmp_path, batches, checkpoint=None))
    assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "a/b", "a\\b", ""])
def test_index_cannot_leave_its_folder(tmp_path, name):
    store(two(), tmp_path / "store")
    index = tmp_path / "store" / "index.json"
    content = store_index._FORMAT.unseal(json.loads(index.read_bytes()), index)
    next(iter(content["shards"].values()))["file"] = name
    index.write_text(json.dumps(store_index._FORMAT.seal(content)))
    with pytest.raises(FileFormatError, match="no name of a file in its folder"):
        ActivationStore(tmp_path / "store")


@pytest.mark.parametrize("missing", ["shards", "layers", "dtype", "batches"])
def test_incomplete_index_is_refused(tmp_path, missing):
    store(two(), tmp_path)
    index = tmp_path / "index.json"
    content = store_index._FORMAT.unseal(json.loads(index.read_bytes()), index)
    del content[missing]
    index.write_text(json.dumps(store_index._FORMAT.seal(content)))
    with pytest.raises(FileFormatError, match="expected the index"):
        ActivationStore(tmp_path)


def test_shard_that_has_grown_is_not_read(tmp_path, monkeypatch):
    opened = store(two(), tmp_path)
    shard = opened["0"].shards[0]
    with open(tmp_path / shard.file, "ab") as file:
        file.truncate(3 << 30)  # sparse: it takes no space
    monkeypatch.setattr(store_index.Path, "read_bytes", lambda path: pytest.fail("was read"))
    with pytest.raises(FileFormatError, match=f"expected {shard.bytes:,} bytes"):
        opened.read(shard)


def test_other_batches_of_numbers_are_told_apart():
    from ipa_torch._fit.batch_digest import chained

    values = [np.float32(1), np.float32(2), 1.0, 1, True, None, "1", b"1", [1], (1,), {1}, {1: 1}]
    digests = {chained("", value) for value in values}
    assert len(digests) == len(values)
