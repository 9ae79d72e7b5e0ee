import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from peft import LoraConfig

import ipa_hf
from ipa_core import ExactCovariance
from ipa_hf.last_logits import last_logits_only

from .families import CAUSAL, FAMILIES
from .models import config, make, text_batches

pytestmark = [
    # PEFT sets fan_in_fan_out for GPT-2, whose weights are transposed.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    # Mixtral's experts are fused: see test_default_targets.py.
    pytest.mark.filterwarnings("ignore:the default targets cover:UserWarning"),
]


def fitted(model, batches, lora=None, **options):
    """Return A by layer, and the numbers of tokens that the head has multiplied."""
    counts = []
    head = model.get_output_embeddings()
    # It runs before the hook of the fit that repeats the logits.
    head.register_forward_hook(lambda _, __, logits: counts.append(logits.shape[-2]))
    peft_model = ipa_hf.get_ipa_model(
        model, lora or config(), batches, learner=ExactCovariance, progress=False, **options
    )
    assert not model._forward_pre_hooks
    assert not head._forward_pre_hooks and len(head._forward_hooks) == 1
    found = {name: p for name, p in peft_model.named_parameters() if "lora_A" in name}
    return found, set(counts)


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(a, expected[name]) for name, a in found.items()
    )


def all_logits(model, batch):
    return model(**batch)


def test_one_token_of_each_sequence_is_multiplied_by_the_head():
    expected, counts = fitted(make("llama"), text_batches(), forward=all_logits)
    assert counts == {10}
    model, shapes = make("llama"), set()
    model.register_forward_hook(lambda _, __, output: shapes.add(tuple(output.logits.shape[:2])))
    found, counts = fitted(model, text_batches())
    assert counts == {1}
    assert shapes == {(6, 10)}
    assert same(found, expected)


def default_A(model, batches, **options):
    torch.manual_seed(0)
    model = ipa_hf.get_ipa_model(model, LoraConfig(r=4), batches, progress=False, **options)
    return {name: p for name, p in model.named_parameters() if "lora_A" in name}


@pytest.mark.parametrize("name", FAMILIES)
def test_all_families_have_the_same_A(name):
    family = FAMILIES[name]
    expected = default_A(family.make(), family.batches(), forward=all_logits)
    assert same(default_A(family.make(), family.batches()), expected)


def gemma4():
    """Return a model whose last layers take keys and values of earlier ones."""
    settings = CAUSAL | {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 64,
    }
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**settings)).eval()


def t5gemma():
    """Return a model that makes its decoder's inputs of the labels."""
    module = transformers.T5GemmaModuleConfig(**CAUSAL | {"head_dim": 8})
    settings = {"encoder": module, "decoder": module, "vocab_size": 64, "pad_token_id": 0}
    return transformers.T5GemmaForConditionalGeneration(
        transformers.T5GemmaConfig(**settings)
    ).eval()


@pytest.mark.parametrize("make_model", [gemma4, t5gemma])
def test_decoders_are_as_they_were(make_model):
    batches = text_batches()
    if make_model is t5gemma:
        batches = [batch | {"labels": batch["input_ids"]} for batch in batches]
    model = make_model()
    expected = default_A(copy.deepcopy(model), batches, forward=all_logits)
    assert same(default_A(model, batches), expected)


def test_passes_of_other_threads_have_all_logits():
    model, (batch, *_) = make("llama"), text_batches()
    with ThreadPoolExecutor(1) as other, torch.no_grad():
        expected = model(**batch).logits
        with last_logits_only(model):
            logits = model(**batch).logits
            assert torch.equal(logits[:, 0], logits[:, -1])
            assert torch.equal(other.submit(model, **batch).result().logits, expected)


def test_batches_with_labels_have_all_logits():
    batches = [batch | {"labels": batch["input_ids"]} for batch in text_batches()]
    weights = {"row_weights": ipa_hf.causal_label_mask}
    expected, _ = fitted(make("llama"), batches, forward=all_logits, **weights)
    found, counts = fitted(make("llama"), batches, **weights)
    assert counts == {10}
    assert same(found, expected)


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}],
)
def test_a_head_with_an_adapter_multiplies_all_tokens(settings):
    _, counts = fitted(make("llama"), text_batches(), LoraConfig(r=2, **settings))
    assert 10 in counts and 1 not in counts


def test_models_of_others_multiply_all_tokens():
    class Own(transformers.LlamaForCausalLM):
        pass

    _, counts = fitted(Own(make("llama").config), text_batches())
    assert counts == {10}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_hooks_are_removed_after_an_error(error):
    model = make("llama")

    def failing():
        yield text_batches(count=1)[0]
        raise error("halt")

    with pytest.raises(error):
        fitted(model, failing())
    head = model.get_output_embeddings()
    assert not head._forward_pre_hooks and len(head._forward_hooks) == 1
