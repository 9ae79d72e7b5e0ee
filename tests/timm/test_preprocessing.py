"""Preprocessing of loader batches into model inputs."""

import pytest
import torch

timm = pytest.importorskip("timm", reason="needs timm on the path: make test-timm")

from timm.data import ImageDataset, create_loader, resolve_model_data_config

import ipa_timm
from ipa_core.errors import ArrayTypeError, ShapeError
from ipa_timm.preprocessing import images_of, preprocess

IMAGES = torch.randn(2, 3, 64, 64)


def vit():
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, img_size=64, depth=1, embed_dim=32, num_heads=2
    )


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        (IMAGES, torch.zeros(2)),
        [IMAGES, torch.zeros(2), "path"],
        {"image": IMAGES, "label": torch.zeros(2)},
        {"label": torch.zeros(2), "pixel_values": IMAGES},
        ({"images": IMAGES}, torch.zeros(2)),
    ],
)
def test_images_are_found(batch):
    assert images_of(batch) is IMAGES
    projectors = ipa_timm.fit_projectors(vit(), [batch], 2, progress=False)
    assert projectors["blocks.0.attn.qkv"].samples == 2 * 17


@pytest.mark.parametrize(
    "batch,received", [({"label": 1, "pixels": 2}, r"keys \['label', 'pixels'\]"), ("x", "str")]
)
def test_no_images(batch, received):
    with pytest.raises(ArrayTypeError, match=f"expected a batch of images.*got {received}"):
        ipa_timm.fit_projectors(vit(), [batch], 2, progress=False)


def test_bytes_are_normalized_by_the_data_config():
    model = vit()
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    size = config["input_size"][-2:]
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    torch.testing.assert_close(preprocess(model, images), (images / 255 - mean) / std)
    small = torch.full((2, 3, 20, 30), 51, dtype=torch.uint8)
    torch.testing.assert_close(preprocess(model, small), ((0.2 - mean) / std).expand(2, 3, *size))


def test_floating_images_are_cast_to_the_dtype_of_the_model():
    model = vit()
    assert preprocess(model, IMAGES) is IMAGES
    assert preprocess(model.bfloat16(), IMAGES).dtype == torch.bfloat16
    projectors = ipa_timm.adapt(model, [(IMAGES, 0)], 2, progress=False)
    assert projectors["blocks.0.mlp.fc1"].components.dtype == torch.float32
    assert model(preprocess(model, IMAGES)).dtype == torch.bfloat16


def test_other_shapes_and_dtypes_are_refused():
    with pytest.raises(ShapeError, match="expected images of shape .* got \\(3, 64, 64\\)"):
        preprocess(vit(), IMAGES[0])
    with pytest.raises(ArrayTypeError, match="floating or uint8, got torch.int64"):
        preprocess(vit(), IMAGES.long())


# timm leaves files open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_loader_of_timm(tmp_path):
    from PIL import Image

    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(2):
            Image.new("RGB", (70, 80), (90 * number, 10, 200)).save(
                tmp_path / label / f"{number}.png"
            )
    loader = create_loader(
        ImageDataset(tmp_path), (3, 64, 64), 2, use_prefetcher=False, num_workers=0
    )
    projectors = ipa_timm.fit_projectors(vit(), loader, 2, progress=False)
    assert projectors["blocks.0.attn.qkv"].samples == 4 * 17


def naflex_batch(padding):
    grid = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"), -1)
    patches = torch.randn(2, 6, 16 * 16 * 3, generator=torch.Generator().manual_seed(0))
    patches[1, 4:] = padding
    return {
        "patches": patches,
        "patch_coord": grid.reshape(1, 6, 2).repeat(2, 1, 1),
        "patch_valid": torch.tensor([[True] * 6, [True] * 4 + [False] * 2]),
        "seq_len": 6,  # timm's collator adds it
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("naflexvit_base_patch16_gap", {}),  # four register tokens
        ("naflexvit_base_patch16_gap", {"reg_tokens": 0}),
        ("naflexvit_base_patch16_gap", {"class_token": True, "reg_tokens": 2}),
        ("naflexvit_base_patch16_map", {}),
        ("naflexvit_so150m2_patch16_reg1_map", {}),
        ("naflexvit_base_patch16_siglip", {}),
    ],
)
def test_padded_patches_of_naflex_do_not_count(name, options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, depth=1, embed_dim=96, num_heads=2, **options)
    learned = [
        ipa_timm.fit_projectors(
            model,
            [(naflex_batch(padding), torch.zeros(2))],
            2,
            targets=["embeds.proj", "attn.qkv", "mlp.fc1"],
            progress=False,
        )
        for padding in (0.0, 50.0)
    ]
    valid = 10 + 2 * model.num_prefix_tokens
    first, second = learned
    samples = {layer: projector.samples for layer, projector in first.items()}
    assert samples.pop("embeds.proj") == 10
    pooled = samples.pop("attn_pool.mlp.fc1", 2)
    assert pooled == 2 and set(samples.values()) == {valid}
    for layer in first:
        torch.testing.assert_close(first[layer].components, second[layer].components)
