"""Inputs and outputs of which no rows can be read: refused with the layer's name and a cure."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._pytree import tree_map

from ipa_core.errors import ArrayTypeError, ShapeError
from ipa_torch import (
    CheckpointConfig,
    LayerError,
    OnlineLearning,
    attach,
    fit_gradient_projectors,
    fit_learners,
    fit_projectors,
    store_activations,
)

X = torch.linspace(-1, 1, 96).reshape(12, 8).sin()


class Foreign(torch.Tensor):
    """Tensor that computes by its own rules: it holds another one, and no storage."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain, keywords = tree_map(
            lambda value: value.values if isinstance(value, cls) else value, (args, kwargs or {})
        )
        return tree_map(
            lambda value: cls(value) if isinstance(value, torch.Tensor) else value,
            function(*plain, **keywords),
        )


class Named(torch.Tensor):
    """Subclass without rules of its own."""


class Scalars(nn.Linear):
    def forward(self, x):
        return super().forward(x.reshape(-1, 1))


class Tuples(nn.Linear):
    def forward(self, x):
        return (super().forward(x),) if x.shape[0] == 12 else super().forward(x)


class Sparse(nn.Linear):
    def forward(self, x):
        return super().forward(x).to_sparse() if x.shape[0] == 12 else super().forward(x)


class Integers(nn.Linear):
    def forward(self, x):
        return super().forward(x).long()


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def run(model, batch):
    return model(batch)


def loss(model, batch):
    return model(batch).square().mean()


def fit(model, batch, _, **options):
    return fit_projectors(
        model, [batch], 1, forward=run, row_weights=None, progress=False, **options
    )


def learn(model, batch, source):
    return fit_learners(
        model, [batch], 1, source=source, forward=run, row_weights=None, progress=False
    )


DOORS = {
    "fit": fit,
    "checkpoint": lambda m, x, path: fit(m, x, path, checkpoint=CheckpointConfig(path, batches=1)),
    "several passes": lambda m, x, path: fit(m, x, path, max_bytes=10_000),
    "inputs": lambda m, x, _: learn(m, x, "inputs"),
    "outputs": lambda m, x, _: learn(m, x, "outputs"),
    "store": lambda m, x, path: store_activations(
        m, [x], path, forward=run, row_weights=None, progress=False
    ),
    "gradients": lambda m, x, _: fit_gradient_projectors(m, [x], 1, loss=loss),
}


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("door", DOORS)
def test_models_in_tensor_parallelism(mesh, tmp_path, door):
    """A rank has a part of the features: with plain outputs, parts of ranks were merged."""
    whole = distribute_tensor(X, mesh, [Replicate()])
    plans = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for model, batch in (
        (distribute_module(small(), mesh), whole),
        (parallelize_module(small(), mesh, plans), X),
        (parallelize_module(small(), mesh, {"2": RowwiseParallel()}), X),
    ):
        with pytest.raises(ArrayTypeError, match=r"layer '[02]': .*DTensor.*is parallelized"):
            DOORS[door](model, batch, tmp_path)


def test_online_learning_in_tensor_parallelism(mesh):
    model = small()
    attach(model, fit_projectors(model, [X], 1, progress=False))
    with pytest.raises(ArrayTypeError, match="layer '0': .*DTensor"), OnlineLearning(model):
        model(distribute_tensor(X, mesh, [Replicate()]))


@pytest.mark.parametrize("door", DOORS)
def test_models_that_fsdp_shards(mesh, tmp_path, door):
    """The weights are DTensors between the passes only."""
    from torch.distributed.fsdp import fully_shard

    model = small()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        assert list(DOORS[door](model, X, tmp_path)) == ["0", "2"]


def fake():
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(X)


FORMS = {
    "foreign": (lambda: Foreign(X), "a Foreign; give it tensors of torch.Tensor"),
    "fake": (fake, "a FakeTensor; give it tensors of torch.Tensor"),
    "nested": (
        lambda: torch.nested.nested_tensor([X, X[:3]], layout=torch.jagged),
        "a nested tensor; give padded batches",
    ),
}


@pytest.mark.parametrize("door", [*DOORS, "online"])
@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_other_classes(tmp_path, door, form):
    make, message = FORMS[form]
    model = small()
    with pytest.raises(ArrayTypeError, match=f"layer '0': .*{message}"):
        if door == "online":
            attach(model, fit_projectors(model, [X], 1, progress=False))
            with OnlineLearning(model):
                model(make())
        DOORS[door](model, make(), tmp_path)


@pytest.mark.parametrize(
    "form", [lambda x: x.as_subclass(Named), nn.Parameter, lambda x: x.t().t()]
)
@pytest.mark.parametrize("door", DOORS)
def test_tensors_that_compute_as_others_do(tmp_path, door, form):
    assert [*DOORS[door](small(), form(X), tmp_path)] == ["0", "2"]


CUTS = {
    "scalar": (Scalars(1, 3), torch.tensor(2.0), ShapeError, "an axis of features, got a scalar"),
    "vector": (nn.Conv2d(3, 2, 2), X[0], ShapeError, r"3 or 4 axes, got shape \(8,\)"),
    "volume": (nn.Conv2d(3, 2, 2), torch.ones(1, 2, 3, 5, 5), ShapeError, "3 or 4 axes, got"),
}


@pytest.mark.parametrize("name", CUTS)
def test_inputs_without_the_axes_of_the_layer(tmp_path, name):
    layer, batch, error, message = CUTS[name]
    with pytest.raises(error, match=f"layer '0': .*{message}"):
        store_activations(
            nn.Sequential(layer), [batch], tmp_path, targets=["0"], forward=run, progress=False
        )


@pytest.mark.parametrize("layer", [Tuples, Sparse, Integers])
def test_outputs_without_rows(layer):
    """Learning by gradients ended in an AttributeError of a tuple, or an error of autograd."""
    model = nn.Sequential(nn.Linear(8, 8), layer(8, 3))
    with pytest.raises((ArrayTypeError, LayerError), match="layer '1': expected"):
        fit_gradient_projectors(
            model, [X], 1, loss=lambda model, batch: model(batch)[0].sum().float()
        )
    if layer is not Tuples:
        with pytest.raises(ArrayTypeError, match="layer '1': expected"):
            learn(model, X, "outputs")
