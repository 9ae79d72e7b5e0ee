"""Quantized base models; `make test-quantized` installs the packages."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel

import ipa_hf
from ipa_torch import fit_projectors

from .models import TARGETS, config, outputs, text_batches, train

pytestmark = pytest.mark.filterwarnings("ignore")  # raised by the packages at import
KINDS = {
    "bitsandbytes-4bit": "Linear4bit",
    "bitsandbytes-8bit": "Linear8bitLt",
    "torchao": "Linear",
}


def quantization(kind):
    if kind == "torchao":
        torchao = pytest.importorskip("torchao", reason="torchao is not installed")
        return transformers.TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig(version=2))
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if kind == "bitsandbytes-8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def load(kind, tmp_path):
    """Return a function that loads a quantized model."""
    quantization_config = quantization(kind)
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64}
    settings = transformers.LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    transformers.LlamaForCausalLM(settings).save_pretrained(tmp_path / "model")

    def loaded(repacks=False):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model",
            quantization_config=copy.deepcopy(quantization_config),
            dtype=torch.float32,
        )
        for module in model.modules():
            # As on CPUs without bfloat16 instructions. Other CPUs evaluate with rounded scales.
            if hasattr(module, "support_avx512bf16_for_cpu") and not repacks:
                module.support_avx512bf16_for_cpu = False
        return model

    return loaded


def prepared(model, **settings):
    return ipa_hf.get_ipa_model(model, config(**settings), text_batches(), progress=False)


def stored(model):
    """Return the dequantized base weights."""
    plain = getattr(model, "get_base_model", lambda: model)()
    return {
        name.replace(".base_layer.", "."): value.dequantize() if hasattr(value, "qdata") else value
        for name, value in copy.deepcopy(plain).state_dict().items()
        if "lora_" not in name
    }


def test_fit_to_the_inputs_of_quantized_layers(load, kind):
    model = load()
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == KINDS[kind]
    expected = fit_projectors(model, text_batches(), 4, targets=TARGETS["llama"], progress=False)
    initialized = prepared(load()).get_base_model()
    assert len(expected) == 10
    for name, projector in expected.items():
        a = initialized.get_submodule(name).lora_A["default"].weight
        torch.testing.assert_close(a / a[0].norm(), projector.components)


def test_base_outputs_and_weights_are_kept(load):
    base, batch = load(), text_batches()[0]
    weights, before = stored(base), outputs(base, batch)
    model = prepared(base)
    assert torch.equal(outputs(model, batch), before)
    train(model, text_batches())
    assert not torch.equal(outputs(model, batch), before)
    after = stored(model)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), before)


def test_stock_peft_loads_it(load, tmp_path):
    model, batch = prepared(load()), text_batches()[0]
    train(model, text_batches())
    model.save_pretrained(tmp_path / "adapter")
    ipa_hf.export_lora(model, tmp_path / "served")
    for folder in ("adapter", "served"):
        again = PeftModel.from_pretrained(load(), tmp_path / folder)
        torch.testing.assert_close(outputs(again, batch), outputs(model, batch), atol=1e-5, rtol=0)


def test_dora(load):
    model, batch = prepared(load(), use_dora=True), text_batches()[0]
    torch.testing.assert_close(outputs(model, batch), outputs(load(), batch), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["bitsandbytes-4bit"])
def test_a_fit_prevents_repacking(load):
    base = load(repacks=True)
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = prepared(base).unload()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    outputs(model, text_batches()[0])  # bitsandbytes may repack now
