"""Hostile values for the public callables: only errors of the library leave them.

Errors raised within what a caller passes, such as a model, a callback or an iterator, pass through.
"""

import numpy as np
import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", reason="needs timm on the path: make test-timm")

from timm.models.vision_transformer import VisionTransformer

import ipa_timm
import ipa_torch
from ipa_core import IncrementalPCA
from ipa_core.errors import ArrayTypeError, FileFormatError, SettingError, ShapeError
from ipa_torch import LayerError
from ipa_torch.extension import adapter_layers
from tests import hostile_values
from tests.hostile_values import Opaque, assert_only_our_errors

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()
LOADER = [(IMAGES, torch.tensor([0, 1]))]
QKV, FC2 = "blocks.0.attn.qkv", "blocks.0.mlp.fc2"


def small():
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return VisionTransformer(num_classes=2, **size)


PROJECTORS = ipa_timm.fit_projectors(small(), LOADER, 2, progress=False)


def adapted():
    model = small()
    ipa_timm.attach(model, PROJECTORS)
    return model


VALUES = [
    *hostile_values.VALUES,
    np.ones((2, 3, 32, 32), "float32"),
    "head",
    ["head"],
    ["norm"],
    {QKV: PROJECTORS[FC2]},
    {QKV: -1},
    {"head": PROJECTORS[QKV]},
    {"image": IMAGES.numpy()},
    {"patches": None},
    {"patches": torch.ones(2, 4, 768), "patch_valid": "all"},
    [*PROJECTORS.values()],
    IncrementalPCA(2),
    IMAGES[0],
    IMAGES.long(),
    IMAGES.to(torch.complex64),
    IMAGES.to("meta"),
    torch.zeros(2, 5, 40, 40, dtype=torch.uint8),
    torch.zeros(2, 3, 0, 40, dtype=torch.uint8),
]
CLASSES = [int, Opaque, nn.Linear]


def fit(**options):
    settings = {"model": small(), "loader": LOADER, "rank": 2, "progress": False} | options
    return ipa_timm.fit_projectors(**settings)


def adapt(**options):
    settings = {"model": small(), "loader": LOADER, "rank": 2, "progress": False} | options
    return ipa_timm.adapt(**settings)


def round_trip(folder, **options):
    ipa_timm.save_adapter(adapted(), folder / "adapter")
    ipa_timm.load_adapter(**{"model": small(), "path": folder / "adapter"} | options)


MODELS = {
    "adapt": lambda x, _: adapt(model=x),
    "attach": lambda x, _: ipa_timm.attach(x, PROJECTORS),
    "default_targets": lambda x, _: ipa_timm.default_targets(x),
    "detach": lambda x, _: ipa_timm.detach(x),
    "fit_projectors": lambda x, _: fit(model=x),
    "load_adapter": lambda x, path: round_trip(path, model=x),
    "merge_and_unload": lambda x, _: ipa_timm.merge_and_unload(x),
    "preprocess": lambda x, _: ipa_timm.preprocess(x, IMAGES),
    "save_adapter": lambda x, path: ipa_timm.save_adapter(x, path / "adapter"),
}
SETTINGS = {
    "fit loader": lambda x, _: fit(loader=x),
    "fit batch": lambda x, _: fit(loader=[x]),
    "fit rank": lambda x, _: fit(rank=x),
    "fit ranks": lambda x, _: fit(rank=dict.fromkeys(PROJECTORS, x)),
    "fit targets": lambda x, _: fit(targets=x),
    "fit on_missing": lambda x, _: fit(on_missing=x),
    "fit row_weights": lambda x, _: fit(row_weights=x),
    "fit forward": lambda x, _: fit(forward=x),
    "adapt scaling": lambda x, _: adapt(scaling=x),
    "adapt targets": lambda x, _: adapt(targets=x),
    "attach projectors": lambda x, _: ipa_timm.attach(small(), x),
    "attach scaling": lambda x, _: ipa_timm.attach(small(), PROJECTORS, scaling=x),
    "attach trainable": lambda x, _: ipa_timm.attach(small(), PROJECTORS, trainable=x),
    "attach dropout": lambda x, _: ipa_timm.attach(small(), PROJECTORS, dropout=x),
    "load path": lambda x, path: round_trip(path, path=x),
    "load dropout": lambda x, path: round_trip(path, dropout=x),
    "preprocess images": lambda x, _: ipa_timm.preprocess(small(), x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_models(name, tmp_path):
    assert_only_our_errors(MODELS[name], [None, *VALUES, *CLASSES], tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, tmp_path):
    assert_only_our_errors(SETTINGS[name], VALUES, tmp_path)


def test_every_public_callable_is_tried():
    """A new public name has to join a table."""
    assert [*MODELS] == ipa_timm.__all__


def test_images_that_are_none():
    model = small()
    for images, error, message in (
        (None, ArrayTypeError, "expected images to be a tensor or a mapping .*, got NoneType"),
        (IMAGES.numpy(), ArrayTypeError, "expected images to be a tensor .*, got ndarray"),
        ({"image": IMAGES}, ArrayTypeError, "expected the patches .* a tensor, got NoneType; pass"),
        (torch.zeros(2, 1, 9, 9, dtype=torch.uint8), ShapeError, "uint8 images of 3 channels.*1,"),
        (torch.zeros(2, 3, 0, 9, dtype=torch.uint8), ShapeError, "at least one pixel, got .*0, 9"),
    ):
        with pytest.raises(error, match=message):
            ipa_timm.preprocess(model, images)
    batch = {"patches": torch.ones(2, 4, 768), "patch_valid": torch.ones(2)}
    with pytest.raises(ShapeError, match=r"patch_valid to be a tensor .* got one of shape \(2,\)"):
        fit(loader=[batch])


def test_adapt_refuses_before_it_fits():
    """Each of these was told after the fit, whose projectors were lost."""
    model, held = adapted(), small()
    held.calls = (held.blocks[0].attn.qkv,)
    loader = iter(LOADER)
    for options in (
        {"scaling": -1},
        {"trainable": "no"},
        {"dropout": 1.0},
        {"model": model},
        {"model": held},
    ):
        with pytest.raises((SettingError, LayerError)):
            adapt(loader=loader, **options)
    assert next(loader) is LOADER[0]


def test_targets_may_be_read_once():
    assert [*adapt(targets=iter(["qkv"]))] == [QKV]


def test_no_forward_is_the_default():
    """`FitOptions.forward` may be None, which passed images and target to the model."""
    assert fit(forward=None)[QKV].samples == PROJECTORS[QKV].samples


def test_classifiers_get_no_adapter():
    """An adapter file of such a model could not be loaded."""
    model = small()
    with pytest.raises(LayerError, match="'head': it belongs to the classifier"):
        ipa_timm.attach(model, {"head": PROJECTORS[QKV]})
    assert type(model.head) is nn.Linear


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_models_within_ddp_are_refused(process_group, tmp_path):
    """DDP does not reduce the gradients of new parameters: ranks would drift apart."""
    ipa_timm.save_adapter(adapted(), tmp_path / "adapter")
    wrapped = nn.parallel.DistributedDataParallel(small())
    for call in (
        lambda: adapt(model=wrapped),
        lambda: ipa_timm.attach(wrapped, PROJECTORS),
        lambda: ipa_timm.load_adapter(wrapped, tmp_path / "adapter"),
    ):
        with pytest.raises(SettingError, match="not wrapped yet, got one under Distributed"):
            call()
    assert not adapter_layers(wrapped.module)
    assert ipa_timm.default_targets(wrapped)[0] == QKV


def test_the_data_config_is_found_within_ddp(process_group):
    model = timm.create_model("test_vit", num_classes=2)
    images = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    wrapped = ipa_timm.preprocess(nn.parallel.DistributedDataParallel(model), images)
    assert torch.equal(wrapped, ipa_timm.preprocess(model, images))


def test_damaged_and_foreign_files_change_nothing(tmp_path):
    model, file = small(), tmp_path / "adapter"
    ipa_timm.save_adapter(adapted(), file)
    whole = file.read_bytes()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(60):
        data = bytearray(whole)
        data[number * len(data) // 60] ^= 1 + number
        file.write_bytes(bytes(data) if number % 3 else whole[: number * len(whole) // 60])
        with pytest.raises(FileFormatError):
            ipa_timm.load_adapter(model, file)
    ipa_torch.save_adapter(adapted(), file)
    with pytest.raises(FileFormatError, match=r"load it with ipa_torch.load_adapter"):
        ipa_timm.load_adapter(model, file)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
