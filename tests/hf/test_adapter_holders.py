"""Adapters held by transformers, by another library's model, and by PEFT's mixed models."""

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model

import ipa_hf
from ipa_core.errors import SettingError
from ipa_hf.adapter_holder import base_model
from ipa_hf.adapter_metadata import AdapterMetadata, find_metadata
from ipa_hf.lora_layers import lora_A_and_B, lora_layers

from .models import base_state, config, make, outputs, same_state, train


class SentenceModel(torch.nn.Sequential):
    """Model of another library that contains a transformers model, as in sentence-transformers."""

    def forward(self, **batch):
        return self[0](**batch)[0].mean(1, keepdim=True), None


def held_by_transformers():
    model = make("llama")
    model.add_adapter(config(), adapter_name="default")
    return model


def held_within_another():
    return SentenceModel(held_by_transformers())


def mixed():
    model = get_peft_model(make("llama"), config(), mixed=True)
    model.add_adapter("other", LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False))
    return model


HOLDERS = [held_by_transformers, held_within_another, mixed]


@pytest.fixture(params=HOLDERS, ids=lambda make_model: make_model.__name__)
def holder(request):
    return request.param()


def trained_parts(model):
    names = (name for name, p in model.named_parameters() if p.requires_grad)
    return {name.split(".")[-3] for name in names}


def test_freeze_projections(holder, batches):
    assert ipa_hf.freeze_projections(holder) is holder
    before = {
        name: x.lora_A["default"].weight.clone()
        for name, x in lora_layers(holder, "default").items()
    }
    train(holder, batches)
    for name, layer in lora_layers(holder, "default").items():
        a, b = lora_A_and_B(layer, "default")
        assert torch.equal(a, before[name])
        assert b.any()


def test_initialize(holder, batches):
    expected = ipa_hf.get_ipa_model(make("llama"), config(), batches, progress=False)
    assert ipa_hf.initialize_lora_ipa_weights(holder, batches, progress=False) is holder
    layers = lora_layers(holder, "default")
    assert find_metadata(holder) == find_metadata(expected)
    for name, layer in lora_layers(expected, "default").items():
        assert torch.equal(
            lora_A_and_B(layers[name], "default")[0], lora_A_and_B(layer, "default")[0]
        )


def test_initialize_runs_the_base_model(batches):
    model = mixed()
    model.set_adapter(["default", "other"])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    adapted = outputs(model, batches[0])
    ipa_hf.initialize_lora_ipa_weights(model, batches, trainable=True, progress=False)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(outputs(model, batches[0]), adapted)  # the other adapter is active again


def test_transformers_saves_the_metadata(batches, tmp_path):
    model = held_by_transformers()
    ipa_hf.initialize_lora_ipa_weights(model, batches, progress=False)
    train(model, batches)
    model.save_pretrained(tmp_path)
    assert AdapterMetadata.read(tmp_path) == find_metadata(model)
    again = ipa_hf.load_adapter(make("llama"), tmp_path, is_trainable=True)
    assert trained_parts(again) == {"lora_B"}
    assert torch.equal(outputs(again, batches[0]), outputs(model, batches[0]))


def test_a_loaded_adapter_is_frozen(batches, tmp_path):
    ipa_hf.get_ipa_model(make("llama"), config(), batches, progress=False).save_pretrained(tmp_path)
    model = make("llama")
    model.load_adapter(str(tmp_path), is_trainable=True)
    assert trained_parts(ipa_hf.freeze_projections(model)) == {"lora_B"}


def test_export(batches, tmp_path):
    model = held_by_transformers()
    ipa_hf.initialize_lora_ipa_weights(model, batches, progress=False)
    train(model, batches)
    ipa_hf.export_lora(model, tmp_path)
    stock = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert (outputs(stock, batches[0]) - outputs(model, batches[0])).abs().max() < 1e-6


def test_weights_of_the_base_model_are_kept(holder, batches):
    ipa_hf.initialize_lora_ipa_weights(holder, batches, progress=False)
    state = {name: x for name, x in base_state(base_model(holder)).items() if "hada" not in name}
    assert same_state(state, base_state(make("llama")))


@pytest.mark.parametrize(
    "door",
    [
        ipa_hf.freeze_projections,
        lambda model: ipa_hf.initialize_lora_ipa_weights(model, []),
        lambda model: ipa_hf.export_lora(model, "."),
    ],
)
def test_a_model_without_adapters_is_refused_by_name(door):
    with pytest.raises(SettingError, match="got a LlamaForCausalLM without; add one"):
        door(make("llama"))
