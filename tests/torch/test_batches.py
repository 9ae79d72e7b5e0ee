"""Batches reach the model in containers of the types that the loader yields."""

import collections
import dataclasses
import types
from typing import NamedTuple

import pytest
import torch
from torch import nn

from ipa_core.errors import ArrayTypeError
from ipa_torch import fit_gradient_projectors, fit_projectors
from ipa_torch._fit.batch_digest import chained
from ipa_torch.extension import on_device


class Pair(NamedTuple):
    x: torch.Tensor
    y: object


@dataclasses.dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    size: int = dataclasses.field(init=False, default=3)
    y: object = None


@dataclasses.dataclass(slots=True)
class Slotted:
    x: torch.Tensor
    y: object = None


class Items(list):
    """A list whose constructor takes something else."""

    def __init__(self, *, items=()):
        super().__init__(items)


class Settable(collections.abc.MutableMapping):
    """A mapping that cannot be made from another one."""

    def __init__(self, *, items):
        self.items_by_key = items

    def __copy__(self):
        return Settable(items=dict(self.items_by_key))

    def __getitem__(self, key):
        return self.items_by_key[key]

    def __setitem__(self, key, value):
        self.items_by_key[key] = value

    def __delitem__(self, key):
        del self.items_by_key[key]

    def __iter__(self):
        return iter(self.items_by_key)

    def __len__(self):
        return len(self.items_by_key)


class Fixed(collections.abc.Mapping):
    """A mapping that can neither be changed nor be made from another one."""

    def __init__(self):
        self.x = torch.ones(2, 4)

    def __getitem__(self, key):
        return {"x": self.x}[key]

    def __iter__(self):
        return iter(["x"])

    def __len__(self):
        return 1


class Graph:
    """A batch that moves itself, and says so."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        self.x = self.x.to(device)
        return self


def encoding(x):
    transformers = pytest.importorskip("transformers")
    return transformers.BatchEncoding({"x": x, "y": [x]})


def model_output(x):
    return pytest.importorskip("transformers").modeling_outputs.BaseModelOutput(
        last_hidden_state=x, hidden_states=(x,)
    )


X = torch.ones(2, 4)
BATCHES = {
    "dict": lambda: {"x": X, "y": [X]},
    "OrderedDict": lambda: collections.OrderedDict(x=X, y=(X,)),
    "defaultdict": lambda: collections.defaultdict(list, x=X, y={"z": X}),
    "UserDict": lambda: collections.UserDict(x=X, y=[X]),
    "mappingproxy": lambda: types.MappingProxyType({"x": X, "y": [X]}),
    "mapping": lambda: Settable(items={"x": X, "y": [X]}),
    "BatchEncoding": lambda: encoding(X),
    "ModelOutput": lambda: model_output(X),
    "namedtuple": lambda: Pair(X, [X]),
    "tuple": lambda: (X, (X,)),
    "list": lambda: [X, [X]],
    "list subclass": lambda: Items(items=[X, [X]]),
    "dataclass": lambda: Sample(X, [X]),
    "slots": lambda: Slotted(X, Pair(X, X)),
    "PackedSequence": lambda: nn.utils.rnn.pack_sequence([X, X]),
    "own to": lambda: Graph(X),
}


def tensors(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, collections.abc.Mapping):
        batch = list(batch.values())
    if dataclasses.is_dataclass(batch):
        batch = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    if isinstance(batch, Graph):
        batch = [batch.x]
    return [t for item in batch for t in tensors(item)] if isinstance(batch, (tuple, list)) else []


@pytest.mark.parametrize("kind", BATCHES)
def test_type_is_kept_and_every_tensor_moves(kind):
    batch = BATCHES[kind]()
    moved = on_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    devices = [tensor.device.type for tensor in tensors(moved)]
    if kind == "PackedSequence":
        assert devices == ["meta", "cpu"]  # the batch sizes belong on the host
    else:
        assert devices and set(devices) == {"meta"}
    assert len(devices) == len(tensors(batch))
    assert {tensor.device.type for tensor in tensors(batch)} == {"cpu"}, "the batch was changed"


def test_fields_without_tensors_stay():
    moved = on_device(Sample(X, "text"), torch.device("meta"))
    assert (moved.y, moved.size) == ("text", 3)
    assert on_device(Sample, torch.device("cpu")) is Sample
    batch = Graph(X)
    assert on_device(batch, None) is batch


def test_mapping_that_cannot_be_rebuilt():
    with pytest.raises(ArrayTypeError, match=r"got Fixed: .*; pass dicts"):
        on_device(Fixed(), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["BatchEncoding", "namedtuple", "dataclass", "mappingproxy"])
def test_loss_gets_the_type(kind):
    seen = []

    def loss(model, batch):
        seen.append(type(batch))
        x = batch["x"] if isinstance(batch, collections.abc.Mapping) else batch.x
        return model(x).square().sum()

    batch = BATCHES[kind]()
    fit_gradient_projectors(nn.Sequential(nn.Linear(4, 2)), [batch], 1, loss=loss)
    assert seen == [type(batch)]


def test_model_gets_the_type():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, batch, size=None):
            assert type(batch) is Sample if size is None else type(size) is Pair
            return self.layer(batch if size is not None else batch.x)

    for batch in (Sample(X), {"batch": X, "size": Pair(X, X)}):
        assert fit_projectors(Model(), [batch], 1, progress=False)["layer"].samples == 2


def test_digest_reads_the_fields_of_dataclasses():
    assert chained("", Sample(X)) == chained("", Sample(X.clone()))
    assert chained("", Sample(X)) != chained("", Sample(X + 1))
    assert chained("", Slotted(X, [X])) != chained("", Slotted(X, [X + 1]))
