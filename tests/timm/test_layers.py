"""Excess error over the float64 optimum of captured inputs, for every kind of layer."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", reason="needs timm on the path: make test-timm")

import ipa_timm
from ipa_core import ExactCovariance
from ipa_timm.same_padding import SamePaddingView
from ipa_torch.extension import view_of

#: Model, options, layer name, and the layer's kernel, stride and groups.
RESNEXT = ("resnet18", {"block": timm.models.resnet.Bottleneck, "cardinality": 4, "base_width": 4})
LITE = ("tf_efficientnet_lite0", {})
VIT = ("test_vit", {})
LAYERS = {
    "linear": (*VIT, "blocks.0.mlp.fc1", None),
    "fused qkv": (*VIT, "blocks.1.attn.qkv", None),
    "pointwise": (*LITE, "blocks.1.1.conv_pw", ((1, 1), (1, 1), 1)),
    "square": ("resnet18", {}, "layer1.0.conv1", ((3, 3), (1, 1), 1)),
    "strided": ("resnet18", {}, "layer2.0.conv1", ((3, 3), (2, 2), 1)),
    "strided pointwise": ("resnet18", {}, "layer2.0.downsample.0", ((1, 1), (2, 2), 1)),
    "grouped": (*RESNEXT, "layer1.0.conv2", ((3, 3), (1, 1), 4)),
    "grouped and strided": (*RESNEXT, "layer2.0.conv2", ((3, 3), (2, 2), 4)),
    "depth-wise": (*LITE, "blocks.2.1.conv_dw", ((5, 5), (1, 1), 144 + 96)),
    "depth-wise, strided, SAME": (*LITE, "blocks.1.0.conv_dw", ((3, 3), (2, 2), 96)),
    "stem, SAME": (*LITE, "conv_stem", ((3, 3), (2, 2), 1)),
    "depth-wise, large": ("test_convnext", {}, "stages.1.blocks.0.conv_dw", ((7, 7), (1, 1), 32)),
}


def captured(model, name, batches):
    inputs = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat([by_hand(layer, x) for x in inputs])


def by_hand(layer, x):
    """Return the rows of an input; one-hot kernels extract the patches of a convolution."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    probe, size = copy.deepcopy(layer), layer.weight[0].numel()
    kernels = torch.eye(size).reshape(size, *layer.weight.shape[1:])
    probe.weight, probe.bias = nn.Parameter(kernels.repeat(layer.groups, 1, 1, 1)), None
    with torch.no_grad():
        entries = probe(x)
    return entries.unflatten(1, (layer.groups, size)).movedim(2, -1).reshape(-1, size)


def excess(projector, rows):
    """Return the relative excess of the reconstruction error over the minimum, in float64."""
    x = rows.double().numpy()
    # Orthonormalized: float32 components are orthonormal only up to rounding.
    components = np.linalg.qr(projector.components.double().numpy().T)[0].T
    scatter = x.T @ x
    lost = np.trace(scatter) - np.trace(components @ scatter @ components.T)
    least = np.linalg.eigvalsh(scatter)[: -projector.rank].sum()
    return lost / max(least, 1e-12 * np.trace(scatter)) - 1


def sized(model):
    """Return an odd image size, so that SAME padding is asymmetric."""
    return 160 if hasattr(model, "pos_embed") else 67


@pytest.mark.parametrize("kind", LAYERS)
def test_excess_over_the_optimum(kind):
    name, options, target, shape = LAYERS[kind]
    model = timm.create_model(name, num_classes=3, **options).eval()
    layer = model.get_submodule(target)
    if shape is not None:
        assert (layer.kernel_size, layer.stride, layer.groups) == shape
    batches = [torch.randn(3, 3, sized(model), sized(model)) for _ in range(2)]
    projectors = ipa_timm.fit_projectors(
        model, batches, 4, targets=[target], learner=ExactCovariance, max_patches=None,
        progress=False,
    )  # fmt: skip
    rows = captured(model, target, batches)
    assert projectors[target].samples == len(rows)
    assert abs(excess(projectors[target], rows)) < 1e-5


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_resnet", "test_convnext"])
def test_excess_of_every_layer_that_is_adapted(name):
    model = timm.create_model(name, num_classes=3).eval()
    batches = [torch.randn(3, 3, sized(model), sized(model))]
    projectors = ipa_timm.adapt(
        model, batches, 4, learner=ExactCovariance, max_patches=None, progress=False
    )
    ipa_timm.detach(model)
    assert list(projectors) == ipa_timm.default_targets(model)
    for target, projector in projectors.items():
        assert abs(excess(projector, captured(model, target, batches))) < 1e-5, target


@pytest.mark.parametrize("size", [(7, 8), (9, 6), (16, 16)])
@pytest.mark.parametrize("kernel,stride,dilation", [(3, 2, 1), (5, 3, 1), (2, 1, 1), (3, 2, 2)])
def test_same_padding_merges_exactly(size, kernel, stride, dilation):
    layer = timm.layers.Conv2dSame(4, 6, kernel, stride, dilation=dilation, groups=2)
    view = view_of(layer)
    assert isinstance(view, SamePaddingView)
    x, features = torch.randn(2, 4, *size), layer.weight[0].numel()
    projection, lora_B = torch.randn(3, features), torch.randn(6, 3)
    with torch.no_grad():
        beside = layer(x) + view.expand(view.project(x, projection), lora_B)
        layer.weight += view.delta_weight(lora_B @ projection, layer.weight)
        torch.testing.assert_close(layer(x), beside, rtol=1e-4, atol=1e-4)
    assert view.row_shape(x) == (2, *beside.shape[-2:])


def test_the_number_of_passes_is_kept():
    model = timm.create_model("test_vit", num_classes=3).eval()
    batches = [torch.randn(2, 3, sized(model), sized(model))]
    whole = ipa_timm.fit_projectors(model, batches, 4, progress=False)
    parts = ipa_timm.fit_projectors(model, batches, 4, max_bytes=600_000, progress=False)
    assert whole.passes == 1
    assert parts.passes > 1
