import pytest
import torch
from peft import LoraConfig

import ipa_hf
from ipa_core import ExactCovariance

from .models import config, make, text_batches


def fitted(model, batches, lora=None, **options):
    """Return A by layer, and the shapes of the inputs of the head during the fit."""
    shapes = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    peft_model = ipa_hf.get_ipa_model(
        model, lora or config(), batches, learner=ExactCovariance, progress=False, **options
    )
    handle.remove()
    assert not model._forward_pre_hooks
    found = {name: p for name, p in peft_model.named_parameters() if "lora_A" in name}
    return found, shapes


def all_logits(model, batch):
    return model(**batch)


def test_the_head_sees_one_token_and_A_is_the_same():
    expected, seen = fitted(make("llama"), text_batches(), forward=all_logits)
    assert {shape[1] for shape in seen} == {10}
    found, seen = fitted(make("llama"), text_batches())
    assert {shape[1] for shape in seen} == {1}
    assert found.keys() == expected.keys()
    for name, a in expected.items():
        assert torch.equal(found[name], a)


def test_labels_are_for_row_weights_only():
    batches = [batch | {"labels": batch["input_ids"]} for batch in text_batches()]
    weights = {"row_weights": ipa_hf.causal_label_mask}
    expected, _ = fitted(make("llama"), batches, forward=all_logits, **weights)
    found, seen = fitted(make("llama"), batches, **weights)
    assert {shape[1] for shape in seen} == {1}
    for name, a in expected.items():
        assert torch.equal(found[name], a)
    assert all("labels" in batch for batch in batches)


def test_a_head_that_is_learned_sees_all_tokens():
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    found, seen = fitted(make("llama"), text_batches(), lora)
    assert 10 in {shape[1] for shape in seen} and 1 not in {shape[1] for shape in seen}
    assert any("lm_head" in name for name in found)


def test_logits_to_keep_of_the_batch_is_obeyed():
    batches = [batch | {"logits_to_keep": 3} for batch in text_batches()]
    _, seen = fitted(make("llama"), batches)
    assert {shape[1] for shape in seen} == {3}


def test_positional_batches_are_as_they_were():
    batches = [(batch["input_ids"],) for batch in text_batches(padding=0)]
    _, seen = fitted(make("llama"), batches, row_weights=None)
    assert {shape[1] for shape in seen} == {10}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_hook_is_removed_after_an_error(error):
    model = make("llama")

    def failing():
        yield text_batches(count=1)[0]
        raise error("halt")

    with pytest.raises(error):
        fitted(model, failing())
    assert not model._forward_pre_hooks
