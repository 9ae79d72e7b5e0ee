"""A layer is a matrix acting on rows: what learning and adapters rest on, for any geometry."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ipa_torch import LayerError
from ipa_torch._layers.conv_view import conv_view_of
from ipa_torch._layers.gather_memory import GatherMemory
from ipa_torch._layers.matmul_view import view_of
from ipa_torch._layers.row_samples import stratified_indices
from ipa_torch._layers.row_subset import RowSubset

from .models import decaying

# Of torch itself, on an even kernel with padding="same".
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@st.composite
def convolutions(draw):
    axes = draw(st.integers(1, 3))
    groups, width = draw(st.integers(1, 3)), draw(st.integers(1, 2))

    def sizes(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    kernel, dilation = sizes(1, 3), sizes(1, 2)
    stride, padding = sizes(1, 3), sizes(0, 2)
    if draw(st.booleans()):
        stride, padding = (1,) * axes, draw(st.sampled_from(["same", "valid"]))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    torch.manual_seed(draw(st.integers(0, 100)))
    layer = kind(
        groups * width, groups * draw(st.integers(1, 2)), kernel, stride=stride,
        padding=padding, dilation=dilation, groups=groups, padding_mode=mode, bias=False,
    )  # fmt: skip
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    # Large enough for every padding mode and every dilated kernel.
    return layer.double(), torch.randn(*batch, groups * width, *sizes(5, 7), dtype=torch.float64)


def flat_output(layer, y):
    """Output (batch, outputs, *places) as (places, groups, outputs of a group)."""
    y = y if y.ndim == len(layer.kernel_size) + 2 else y[None]
    return y.movedim(1, -1).reshape(-1, layer.groups, layer.out_channels // layer.groups)


@given(convolutions())
def test_rows_times_the_weight_are_the_output(case):
    layer, x = case
    view = view_of(layer)
    rows, _ = view.im2row(x, RowSubset(), None)
    weight = layer.weight.detach().flatten(1).unflatten(0, (layer.groups, -1))
    with torch.no_grad():
        y = layer(x)
    got = torch.einsum("ngd,god->ngo", rows.unflatten(0, (-1, layer.groups)), weight)
    torch.testing.assert_close(got, flat_output(layer, y))
    axes = len(layer.kernel_size)
    batch = x.shape[0] if x.ndim == axes + 2 else 1
    assert view.row_shape(x) == (batch, *y.shape[-axes:])


@given(convolutions())
def test_lifted_projection_is_the_merged_weight(case):
    layer, x = case
    view = view_of(layer)
    rank, outputs, features = 2, layer.out_channels, layer.weight[0].numel()
    p, b = torch.randn(rank, features).double(), torch.randn(outputs, rank).double()
    got = view.expand(view.project(x, p), b)
    with torch.no_grad():
        layer.weight.copy_(view.delta_weight(b @ p, layer.weight))
        torch.testing.assert_close(got, layer(x))


@given(convolutions(), st.integers(1, 40))
def test_pairs_are_at_the_same_places(case, limit):
    layer, x = case
    with torch.no_grad():
        y = layer(x)
    rows, grads = view_of(layer).rows_and_grads(x, y, limit)
    weight = layer.weight.detach().flatten(1).unflatten(0, (layer.groups, -1))
    torch.testing.assert_close(torch.einsum("ngd,god->ngo", rows, weight), grads)


@given(st.integers(1, 500), st.integers(1, 60))
def test_spread_draws_from_all_over(count, limit):
    drawn = stratified_indices(count, limit)
    if drawn is None:
        assert count <= limit
        return
    assert len(drawn) == limit
    assert 0 <= min(drawn) and max(drawn) < count
    # One from each stretch: neighbors are at most two stretches apart.
    assert bool((drawn.diff() >= 0).all())
    assert bool((drawn.diff() <= 2 * count / limit + 1).all())


def test_spread_is_unbiased():
    drawn = torch.cat([stratified_indices(10, 4) for _ in range(4000)])
    hits = torch.bincount(drawn, minlength=10)
    assert float((hits / 1600 - 1).abs().max()) < 0.1


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_linear_layer(shape):
    layer, x = nn.Linear(5, 4, bias=False), torch.randn(shape)
    view = view_of(layer)
    rows, _ = view.im2row(x, RowSubset(), None)
    assert view.row_shape(x) == shape[:-1]
    torch.testing.assert_close(rows @ layer.weight.T, layer(x).reshape(-1, 4))


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Named(nn.Conv2d):
    pass


def test_convolution_with_its_own_forward_is_refused_until_its_view_is_registered():
    with pytest.raises(LayerError, match="got Standardized with its own forward"):
        view_of(Standardized(2, 2, 3))
    assert view_of(Named(2, 2, 3)) == view_of(nn.Conv2d(2, 2, 3))
    known = view_of.register(Standardized)(lambda module: conv_view_of(nn.Conv2d(2, 2, 3)))
    assert view_of(Standardized(2, 2, 3)) == known(None)


def test_gathered_rows_on_the_host_share_memory_that_grows():
    memory = GatherMemory()
    subset = RowSubset(torch.tensor([3, 1, 1], device="cpu"), memory=memory)
    small, large = decaying(5, 4).cpu(), decaying(5, 8, seed=1).cpu()
    first = subset.take(small)
    assert torch.equal(first, small[[3, 1, 1]])
    second = subset.take(large)
    assert torch.equal(second, large[[3, 1, 1]])
    again = subset.take(small)
    assert torch.equal(again, small[[3, 1, 1]])
    assert again.data_ptr() == second.data_ptr()
    half = subset.take(small.half())
    assert torch.equal(half, small.half()[[3, 1, 1]]) and torch.equal(again, small[[3, 1, 1]])
    assert RowSubset().take(small) is small
