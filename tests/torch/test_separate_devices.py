"""Adapters, projections, rows and gradient sketches on a device without values.

torch's meta device has no values: whatever asks it for one raises. `Separate` raises on operations
that tensors of the host and of the device meet in. So nothing of the host meets the device, and the
device is asked for nothing.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import _config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipa_core import RandomizedSVD
from ipa_torch import (
    DampedGradientSketch,
    GradientSketch,
    GradientWeightedInputs,
    attach,
    fit_projectors,
)
from ipa_torch._capture.row_selection import RowSelection
from ipa_torch._fit.convergence import Convergence
from ipa_torch._layers.matmul_view import view_of

from .models import Transformer, decaying

COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}


class Separate(TorchDispatchMode):
    """Mode in which tensors of two devices do not meet, but in copies; numbers are no tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        kinds = {x.device.type for x in tensors if x.ndim}
        if len(kinds) > 1 and func.overloadpacket not in COPIES:
            raise RuntimeError(f"{func}: expected tensors of one device, got {sorted(kinds)}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "operation",
    [
        lambda there, here: there @ here.T,
        lambda there, here: there + here,
        lambda there, here: there[torch.tensor([0])],
        lambda there, here: torch.nn.functional.linear(there, here),
        lambda there, here: bool(there.any()),
        lambda there, here: there.cpu(),
    ],
)
def test_what_meets_or_asks_is_found(operation):
    there, here = torch.empty(3, 4, device="meta"), torch.ones(3, 4)
    with Separate(), pytest.raises((RuntimeError, NotImplementedError), match="one device|meta"):
        operation(there, here)


def adapted(dtype, trainable=False):
    model, batch = Transformer(), torch.randint(0, 20, (4, 9))
    projectors = fit_projectors(model, [batch], 3, progress=False)
    attach(model, projectors, dropout=0.1, trainable=trainable)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [False, True])
def test_adapters_train(trainable, dtype):
    model = adapted(dtype, trainable).to("meta")
    with Separate():
        output = model(torch.empty(4, 9, dtype=torch.long, device="meta"))
        output.square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.is_meta for p in trained)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_compute_on_a_fake_accelerator(dtype):
    """Without gradients, as autograd needs the streams of a driver."""
    model, device, mode = adapted(dtype), torch.device("cuda", 0), FakeTensorMode()
    for part in model.modules():
        for name, tensor in list(part.named_parameters(recurse=False)):
            fake = mode.from_tensor(tensor.detach())
            with mode:
                setattr(part, name, nn.Parameter(fake.to(device), requires_grad=False))
        for name, tensor in list(part.named_buffers(recurse=False)):
            fake = mode.from_tensor(tensor)
            with mode:
                setattr(part, name, fake.to(device))
    with mode, torch.no_grad():
        output = model(torch.randint(0, 20, (4, 9), device=device))
    assert isinstance(output, FakeTensor) and output.device == device and output.dtype == dtype


LAYERS = {
    "linear": (nn.Linear(12, 5), (4, 9, 12)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 8, 8)),
    "reflecting": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (3, 4, 20)),
}


@pytest.mark.parametrize("limit", [None, 7])
@pytest.mark.parametrize("weights", ["ones", "mask", "floats"])
@pytest.mark.parametrize("layer", LAYERS)
def test_rows_are_read(layer, weights, limit):
    """Rows are read on the device, and their weights stay on the host, for the learner."""
    module, shape = LAYERS[layer]
    view = view_of(module)
    row_shape = view.row_shape(torch.zeros(shape))
    kept = {
        "ones": torch.ones(row_shape),
        "mask": (torch.rand(row_shape) < 0.7).long(),
        "floats": torch.rand(row_shape),
    }[weights]
    selection = RowSelection(kept)
    expected, _ = view.im2row(torch.zeros(shape), selection.on(torch.device("cpu")), limit)
    there = torch.device("meta")
    with Separate():
        x = torch.empty(shape, device=there)
        rows, row_weights = view.im2row(x, selection.on(there), limit)
    assert rows.is_meta and rows.shape == expected.shape
    assert (row_weights is not None) == (weights == "floats")
    assert row_weights is None or (row_weights.device.type, len(row_weights)) == ("cpu", len(rows))


class RowsOnly(RandomizedSVD):
    """Learner that takes rows on the device, and nothing from it."""

    def __init__(self, rank):
        super().__init__(rank)
        self.rows = ()

    def begin_update(self, rows, weights=None):
        assert rows.is_meta and weights.is_meta
        self.rows += (tuple(rows.shape),)
        return self

    def finish(self):
        return self


SKETCHES = {
    "plain": GradientSketch,
    "damped": lambda rank: DampedGradientSketch(rank, RowsOnly),
    "weighted": lambda rank: GradientWeightedInputs(rank, learner=RowsOnly),
}


@pytest.mark.parametrize("kind", SKETCHES)
def test_gradient_sketches(monkeypatch, kind):
    """A sketch asks for two decisions and for the rows with a gradient; all else stays there."""
    decisions = []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: decisions.append(self) or True)
    learner = SKETCHES[kind](2)
    with Separate(), _config.patch(meta_nonzero_assume_all_nonzero=True):
        for _ in range(2):
            x, g = torch.empty(50, 2, 12, device="meta"), torch.empty(50, 2, 7, device="meta")
            learner.update(x, g)
    if kind != "plain":
        assert learner._inputs.rows == ((100, 12),) * 2
    if kind != "weighted":
        assert learner._image.is_meta and learner._sampled_rows[0].is_meta
    assert len(decisions) == (0 if kind == "weighted" else 4)


def test_convergence_scores_rows():
    convergence = Convergence(0.1)
    model = nn.Sequential(nn.Linear(12, 4))
    projector = fit_projectors(model, [decaying(50, 12)], 2, progress=False)["0"]
    arrays = {name: getattr(projector, name).to("meta") for name in ("components", "mean")}
    convergence._half = convergence._now = type("OnDevice", (), arrays)()
    with Separate():
        convergence._score(torch.empty(30, 12, device="meta"), torch.rand(30))
    assert convergence._sums.is_meta
