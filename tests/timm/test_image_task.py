"""The image task: the split ViT equals the whole one, and adapters of all kinds train."""

import numpy as np
import pytest
import torch
from PIL import Image

timm = pytest.importorskip("timm", reason="needs timm on the path: make test-timm")

from benchmarks.evidence.images import VIT_PIXELS, ImageTask
from benchmarks.evidence.methods import METHODS, Adapter
from benchmarks.evidence.task import Settings, batches
from benchmarks.evidence.training import train
from ipa_timm import preprocess

SETTINGS = Settings(rank=2, steps=40, batch_size=16, learn_from=32)
COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


def tiny(**options):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_small_patch14_dinov2", img_size=VIT_PIXELS, depth=3, embed_dim=32, num_heads=2,
        num_classes=0, init_values=1.0, **options,
        pretrained_cfg_overlay={"input_size": (3, VIT_PIXELS, VIT_PIXELS)},
    )  # fmt: skip


def rows(count):
    rng = np.random.default_rng(0)
    labeled = []
    for number in range(count):
        noise = rng.integers(-30, 31, (VIT_PIXELS, VIT_PIXELS, 3))
        image = np.clip(noise + COLORS[number % 3], 0, 255).astype(np.uint8)
        labeled.append((Image.fromarray(image), number % 3))
    return labeled


@pytest.fixture(scope="module")
def task():
    return ImageTask("toy", adapted=2, rows=rows(140), make=tiny, sizes=(60, 20, 40))


def test_features_are_those_of_the_whole_model(task):
    batch = next(batches(task.training(0), 16, 1, 0))
    model = task.fresh(0)
    features = model.features(model.body, batch)
    vit = tiny().eval()
    images = torch.from_numpy(np.stack([np.asarray(image) for image, _ in rows(140)]))
    with torch.no_grad():
        every = vit(preprocess(vit, images.permute(0, 3, 1, 2)))
        distance, places = torch.cdist(features, every).min(1)
    torch.testing.assert_close(features, every[places], atol=1e-4, rtol=1e-4)
    labels = torch.tensor([label for _, label in rows(140)])
    assert torch.equal(labels[places], batch["labels"])


def test_parts_are_disjoint_and_of_their_sizes(task):
    held_out = {id(e) for part in task._parts.values() for e in part}
    assert not held_out & {id(e) for e in task.training(0)}
    assert (task.size("validation"), task.size("test"), len(task.training(0))) == (20, 40, 60)


@pytest.mark.parametrize("name", ["LoRA", "IPA, frozen", "damped gradient, frozen", "EVA"])
def test_method_learns(name, task):
    model, spent = Adapter(task, SETTINGS)(METHODS[name], seed=0)
    cost = train(model, task, SETTINGS, 1e-2, 0, spent)
    assert cost.steps == SETTINGS.steps - round(spent)
    assert task.accuracy(model, "test")["toy"] > 0.9


def test_vit_that_pools_otherwise_is_refused():
    with pytest.raises(ValueError, match="expected a ViT whose features are its class token"):
        ImageTask(
            "toy", adapted=2, rows=rows(4), make=lambda: tiny(global_pool="avg"), sizes=(1, 1, 1)
        )


def test_p_of_other_texts_is_refused(task):
    with pytest.raises(ValueError, match="expected a P from 'toy' itself, got one from 'reviews'"):
        task.of_texts("reviews", 0)
