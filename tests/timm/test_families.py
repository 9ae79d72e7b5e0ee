"""Families of timm: outputs start unchanged, each adapter has an effect, merging is exact."""

import pytest

pytest.importorskip("timm", reason="needs timm on the path: make test-timm")

from benchmarks.timm_families import check
from ipa_timm.targets import FAMILIES as KNOWN

BLOCKS = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64}
SWIN = {"depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4), "img_size": 64, "window_size": 4}

#: Model, image size, options, and number of layers with an adapter by default.
FAMILIES = {
    "vision_transformer": ("vit_tiny_patch16_224", 64, BLOCKS, 8),
    "deit": ("deit_tiny_distilled_patch16_224", 64, BLOCKS, 8),
    "beit, F.linear": ("beit_base_patch16_224", 64, BLOCKS, 8),
    "eva, F.linear": ("vit_tiny_patch16_dinov3_qkvb", 64, BLOCKS, 8),
    "eva, q, k and v apart": ("eva02_base_patch14_224", 56, BLOCKS | {"img_size": 56}, 14),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 64, SWIN, 12),
    "swin_transformer_v2, F.linear": ("swinv2_tiny_window8_256", 64, SWIN, 12),
    "convnext": ("convnext_atto", 64, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 8),
    "efficientnet": ("efficientnet_b0", 64, {}, 32),
    "efficientnet, SAME padding": ("tf_efficientnetv2_b0", 64, {}, 42),
    "resnet": ("resnet18", 64, {}, 16),
    "mlp_mixer": ("mixer_s32_224", 224, {}, 32),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}, 23),
    "mobilenetv3, the fourth": ("mobilenetv4_hybrid_medium", 64, {}, 80),
    "efficientnet, mixed": ("mixnet_s", 64, {}, 53),
    "family without default targets": ("regnetx_002", 64, {}, 43),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    model, pixels, options, layers = FAMILIES[family]
    result = check(model, pixels, **options)
    assert result.works, result
    assert (result.layers, result.missing) == (layers, {})


def test_every_family_with_targets_of_its_own_is_tried():
    tried = {name.partition(",")[0] for name in FAMILIES}
    # Vision transformers with another position bias.
    assert KNOWN.keys() - tried == {"vision_transformer_relpos"}


def test_weights_that_are_standardized_are_refused():
    result = check("resnetv2_50x1_bit", 64)
    assert result.verdict == "refused"
    assert "got StdConv2d with its own forward" in str(result.missing)
