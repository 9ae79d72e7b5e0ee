"""Models offloaded by accelerate, and bfloat16 base models."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

import ipa_hf
from ipa_core import SettingError
from ipa_torch import LayerError

from .models import config, make, outputs, text_batches, train

# One layer in memory, the other on disk, as device_map="auto" does under memory pressure.
DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
METHODS = ["device_map", "cpu_offload", "disk_offload"]


@pytest.fixture
def load(tmp_path):
    """Return a function that loads a bfloat16 model, with or without offloading."""
    folder = tmp_path / "model"
    make("llama").to(torch.bfloat16).save_pretrained(folder)

    def loaded(method=None):
        options = {"dtype": torch.bfloat16}
        if method == "device_map":
            options |= {"device_map": DEVICE_MAP, "offload_folder": tmp_path / "offload"}
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        if method == "cpu_offload":
            return cpu_offload(model, torch.device("cpu"))
        if method == "disk_offload":
            return disk_offload(model, tmp_path / "disk", torch.device("cpu"))
        return model

    return loaded


def prepared(model, **settings):
    return ipa_hf.get_ipa_model(model, config(**settings), text_batches(), progress=False)


def lora_A_and_B(model, part):
    return {n: p.detach().clone() for n, p in model.named_parameters() if f"lora_{part}" in n}


@pytest.mark.parametrize("method", METHODS)
def test_offloaded_as_in_memory(load, method, tmp_path):
    batch, whole, offloaded = text_batches()[0], load(), load(method)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    before = outputs(whole, batch)
    expected, actual = prepared(whole), prepared(offloaded)
    assert torch.equal(outputs(actual, batch), before)
    for name, a in lora_A_and_B(expected, "A").items():
        assert torch.equal(lora_A_and_B(actual, "A")[name], a)
    for model in (expected, actual):
        train(model, text_batches())
    for name, b in lora_A_and_B(expected, "B").items():
        assert b.any() and torch.equal(lora_A_and_B(actual, "B")[name], b)
    with actual.disable_adapter():
        assert torch.equal(outputs(actual, batch), before)
    actual.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        outputs(ipa_hf.load_adapter(load(), tmp_path / "adapter"), batch), outputs(actual, batch)
    )


def test_unloaded_weights_are_refused():
    with torch.device("meta"):
        model = make("llama")
    with pytest.raises(LayerError, match=r"layer '.*': .*load the model's weights first"):
        prepared(model)


def test_dora_needs_the_weights(load):
    with pytest.raises(SettingError, match=r"layer 'model.layers.1.*DoRA"):
        prepared(load("device_map"), use_dora=True)
