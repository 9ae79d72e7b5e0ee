import pytest
import torch

import ipa_hf
from ipa_core import ExactCovariance, ShapeError

from .models import config, make, text_batches


def learned(batches, **options):
    """Return A of the first block's q and of the last block's down projection."""
    model = ipa_hf.get_ipa_model(
        make("llama"), config(), batches, learner=ExactCovariance, progress=False, **options
    )
    layers = model.get_base_model().model.layers
    return [
        layer.lora_A["default"].weight
        for layer in (layers[0].self_attn.q_proj, layers[1].mlp.down_proj)
    ]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def test_prompts_do_not_count():
    batches = text_batches(padding=0)
    expected = learned(
        batches, row_weights=lambda batch: (torch.arange(10) > 3).expand(6, 10).to(torch.float32)
    )
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :5] = -100
        # The last position predicts nothing, so append one more.
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.ones(6, 1, dtype=torch.long)], 1)
        batch["labels"] = torch.cat([batch["labels"], torch.ones(6, 1, dtype=torch.long)], 1)
        batch["attention_mask"] = torch.ones(6, 11, dtype=torch.long)
    close(learned(batches, row_weights=ipa_hf.causal_label_mask), expected)


def test_padding_never_counts():
    (batch,) = text_batches(count=1)
    weights = ipa_hf.causal_label_mask(batch | {"labels": batch["input_ids"]})
    assert not weights[batch["attention_mask"] == 0].any()
    assert not weights[:, -1].any()


@pytest.mark.parametrize("batch", [{}, {"labels": torch.ones(3)}, torch.ones(2, 2)])
def test_without_labels(batch):
    with pytest.raises(ShapeError, match="labels"):
        ipa_hf.causal_label_mask(batch)


def test_packed_sequences_give_what_they_give_one_by_one():
    batches = text_batches(padding=0)
    packed = [
        {
            "input_ids": batch["input_ids"].reshape(1, -1),
            "position_ids": torch.arange(10).repeat(6)[None],
        }
        for batch in batches
    ]
    close(learned(packed), learned(batches))


def test_the_cache_setting_is_kept():
    model = make("llama")
    ipa_hf.get_ipa_model(model, config(), text_batches(), progress=False)
    assert model.config.use_cache
