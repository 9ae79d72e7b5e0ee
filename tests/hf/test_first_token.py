import json

import pytest
import torch

import ipa_hf
from ipa_core import ExactCovariance, ShapeError
from ipa_hf import adapter_metadata
from ipa_hf.adapter_metadata import FILE_NAME, AdapterMetadata
from ipa_torch import attention_mask

from .models import config, make, text_batches

weights = ipa_hf.without_first_token


def adapted(batches, **options):
    return ipa_hf.get_ipa_model(
        make("llama"), config(), batches, learner=ExactCovariance, progress=False, **options
    )


def rows(model):
    """Return A of the first block's q and of the last block's down projection."""
    layers = model.get_base_model().model.layers
    return [
        layer.lora_A["default"].weight
        for layer in (layers[0].self_attn.q_proj, layers[1].mlp.down_proj)
    ]


@pytest.mark.parametrize("padding", [0, 3])
def test_first_tokens_do_not_count(padding):
    batches = text_batches(padding=padding)

    def by_hand(batch):
        mask = batch["attention_mask"].clone()
        mask[torch.arange(len(mask)), mask.argmax(1)] = 0
        return mask

    found = rows(adapted(batches, row_weights=weights))
    for actual, expected in zip(found, rows(adapted(batches, row_weights=by_hand)), strict=True):
        torch.testing.assert_close(actual, expected)
    plain = rows(adapted(batches))
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(found, plain, strict=True))


def test_packed_rows():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    batch = {"input_ids": torch.ones(1, 8, dtype=torch.long), "position_ids": positions}
    assert weights(batch).tolist() == [[0, 1, 1, 0, 1, 0, 1, 1]]


def test_positions_of_padded_rows():
    """Padding has positions of its own, and one row of positions may stand for all."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    positions = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 1]])
    expected = [[0, 0, 0, 1, 1], [0, 1, 1, 1, 0]]
    assert weights({"attention_mask": mask, "position_ids": positions}).tolist() == expected
    assert weights({"attention_mask": mask, "position_ids": torch.arange(5)[None]}).tolist() == (
        expected
    )
    axes = positions.expand(3, 2, 5)  # of images, videos and texts
    assert weights({"attention_mask": mask, "position_ids": axes}).tolist() == expected


def test_embeddings_without_a_mask():
    assert weights({"inputs_embeds": torch.ones(2, 3, 4)}).tolist() == [[0, 1, 1]] * 2


def test_product_with_labels():
    ids = torch.ones(1, 4, dtype=torch.long)
    batch = {"input_ids": ids, "labels": torch.tensor([[-100, -100, 5, 2]])}
    assert (weights(batch) * ipa_hf.causal_label_mask(batch)).tolist() == [[0, 1, 1, 0]]


ENCODER_DECODER = dict.fromkeys(("attention_mask", "decoder_attention_mask"), torch.ones(2, 3))


@pytest.mark.parametrize(
    "batch", [{}, {"pixel_values": torch.ones(1, 3)}, torch.ones(2, 2), ENCODER_DECODER]
)
def test_other_batches(batch):
    with pytest.raises(ShapeError, match="expected batches of a causal language model"):
        weights(batch)


class Halves:
    def __call__(self, batch):
        return 0.5 * attention_mask(batch)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "attention_mask"),
        ({"row_weights": weights}, "without_first_token"),
        ({"row_weights": None}, "all rows"),
        ({"row_weights": Halves()}, "Halves"),
    ],
)
def test_metadata_record_the_row_weights(options, name, tmp_path):
    adapted(text_batches(), **options).save_pretrained(tmp_path)
    assert AdapterMetadata.read(tmp_path).row_weights == name
    loaded = ipa_hf.load_adapter(make("llama"), tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert AdapterMetadata.read(tmp_path / "again").row_weights == name


def test_earlier_metadata_and_fitted_projectors_have_none(tmp_path):
    adapted(text_batches()).save_pretrained(tmp_path)
    path = tmp_path / FILE_NAME
    content = json.loads(path.read_text())
    del content["row_weights"], content["sha256"]
    content["sha256"] = adapter_metadata._digest(content)
    path.write_text(json.dumps(content))
    assert AdapterMetadata.read(tmp_path).row_weights is None
    projectors = fitted()
    ipa_hf.get_ipa_model(make("llama"), config(), projectors).save_pretrained(tmp_path / "fitted")
    assert AdapterMetadata.read(tmp_path / "fitted").row_weights is None


def fitted():
    from ipa_torch import fit_projectors

    model = make("llama")
    targets = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    return fit_projectors(model, text_batches(), 4, targets=targets, progress=False)
