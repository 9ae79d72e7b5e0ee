"""Models whose weights accelerate keeps elsewhere and loads when a layer runs; bfloat16 bases."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

import ipa_hf
from ipa_core import SettingError

from .models import config, make, outputs, text_batches, train

# One layer in memory, one on disk, as device_map="auto" does where memory is short.
SHARDS = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
HOW = ["device_map", "cpu_offload", "disk_offload"]


@pytest.fixture
def load(tmp_path):
    """Return a function that loads a bfloat16 model, offloaded in one way or not."""
    folder = tmp_path / "model"
    make("llama").to(torch.bfloat16).save_pretrained(folder)

    def loaded(how=None):
        options = {"dtype": torch.bfloat16}
        if how == "device_map":
            options |= {"device_map": SHARDS, "offload_folder": tmp_path / "offload"}
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        if how == "cpu_offload":
            return cpu_offload(model, torch.device("cpu"))
        if how == "disk_offload":
            return disk_offload(model, tmp_path / "disk", torch.device("cpu"))
        return model

    return loaded


def prepared(model, **settings):
    return ipa_hf.get_ipa_model(model, config(**settings), text_batches(), progress=False)


def lora_A_and_B(model, part):
    return {n: p.detach().clone() for n, p in model.named_parameters() if f"lora_{part}" in n}


@pytest.mark.parametrize("how", HOW)
def test_offloaded_as_in_memory(load, how, tmp_path):
    batch, whole, offloaded = text_batches()[0], load(), load(how)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    before = outputs(whole, batch)
    expected, found = prepared(whole), prepared(offloaded)
    assert torch.equal(outputs(found, batch), before)
    for name, a in lora_A_and_B(expected, "A").items():
        assert torch.equal(lora_A_and_B(found, "A")[name], a)
    for model in (expected, found):
        train(model, text_batches())
    for name, b in lora_A_and_B(expected, "B").items():
        assert b.any() and torch.equal(lora_A_and_B(found, "B")[name], b)
    with found.disable_adapter():
        assert torch.equal(outputs(found, batch), before)
    found.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        outputs(ipa_hf.load(load(), tmp_path / "adapter"), batch), outputs(found, batch)
    )


def test_layers_that_nobody_loads_are_refused():
    with torch.device("meta"):
        model = make("llama")
    with pytest.raises(SettingError, match="load the model's weights first"):
        prepared(model)


def test_dora_needs_the_weights(load):
    with pytest.raises(SettingError, match=r"layer 'model.layers.1.*DoRA"):
        prepared(load("device_map"), use_dora=True)
