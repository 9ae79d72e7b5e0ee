"""Exports are checked against the model that a server will build."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import ipa_hf
from ipa_core import SettingError

from .models import config, make
from .moe_models import make as make_moe

SIZE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
TEXT = Gemma3TextConfig(vocab_size=64, num_key_value_heads=1, head_dim=8, **SIZE)
WHOLE = Gemma3Config(text_config=TEXT.to_dict(), vision_config=SIZE)


def meta(cls, settings):
    with torch.device("meta"):
        return cls(settings)


def test_the_trained_class_has_every_layer(tmp_path):
    model = get_peft_model(make("llama"), config())
    for served in (LlamaForCausalLM, make("llama")):
        ipa_hf.export_lora(model, tmp_path, check=served)  # no warning


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_fused_experts_are_found(family, tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    model = get_peft_model(make_moe(family), lora)
    ipa_hf.export_lora(model, tmp_path, check=type(make_moe(family)))


def test_a_text_adapter_would_do_nothing_in_the_multimodal_model(tmp_path):
    model = get_peft_model(Gemma3ForCausalLM(TEXT), config(target_modules=["q_proj", "down_proj"]))
    served = meta(Gemma3ForConditionalGeneration, WHOLE)
    with pytest.raises(SettingError) as refused:
        ipa_hf.export_lora(model, tmp_path / "served", check=served)
    for part in ("got 0 of 8", "'model.layers.0", "'model.language_model.layers.0", "train and"):
        assert part in str(refused.value)
    assert not (tmp_path / "served").exists()


def test_an_adapter_of_the_multimodal_model_is_found(tmp_path):
    targets = r".*language_model.*\.(q_proj|down_proj)"
    model = Gemma3ForConditionalGeneration(WHOLE)
    model = get_peft_model(model, config(target_modules=targets))
    ipa_hf.export_lora(model, tmp_path, check=meta(Gemma3ForConditionalGeneration, WHOLE))


def test_layers_that_are_not_found_are_named(tmp_path):
    served = make("llama")
    del served.model.layers[1]
    model = get_peft_model(make("llama"), config(target_modules=["down_proj"]))
    with pytest.warns(UserWarning, match=r"got 1 of 2.*not found: model.layers.1.mlp.down_proj"):
        ipa_hf.export_lora(model, tmp_path, check=served)


def test_a_class_with_another_configuration_is_refused(tmp_path):
    model = get_peft_model(make("llama"), config())
    with pytest.raises(SettingError, match="takes LlamaConfig, got GPT2LMHeadModel; pass a model"):
        ipa_hf.export_lora(model, tmp_path, check=GPT2LMHeadModel)
