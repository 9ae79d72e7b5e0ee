"""Exported adapters satisfy the rules of vLLM, SGLang and llama.cpp."""

import dataclasses
import json
import re

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file

import ipa_hf
from ipa_core import SettingError
from ipa_hf.adapter_metadata import find_metadata

from .models import config, make, outputs, text_batches, train

CASES = {
    "plain": ("llama", {}),
    "ranks": ("llama", {"rank_pattern": {"q_proj": 2, "down_proj": 7}}),
    "rslora": ("llama", {"use_rslora": True, "r": 3}),
    "rslora-ranks": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "alphas": ("llama", {"alpha_pattern": {"v_proj": 3}}),
    "fraction": ("llama", {"r": 3, "lora_alpha": 7, "rank_pattern": {"q_proj": 5}}),
    "some-blocks": ("llama", {"layers_to_transform": [1]}),
    "regex": ("llama", {"target_modules": r".*0\.self_attn\.(q|v)_proj"}),
    "gpt2": ("gpt2", {"fan_in_fan_out": True}),
}


@pytest.fixture(params=CASES)
def exported(request, tmp_path):
    """Return a trained model, its export folder and its family."""
    family, lora = CASES[request.param]
    batches = text_batches()
    model = ipa_hf.get_ipa_model(make(family), config(family, **lora), batches, progress=False)
    train(model, batches)
    ipa_hf.export_lora(model, tmp_path)
    return model, tmp_path, family


def read(folder):
    settings = json.loads((folder / "adapter_config.json").read_text())
    return settings, load_file(folder / "adapter_model.safetensors")


def products(model):
    """Return the update of each weight by the adapter, as computed in training."""
    return {
        name: layer.scaling["default"]
        * layer.lora_B["default"].weight.detach()
        @ layer.lora_A["default"].weight.detach()
        for name, layer in model.get_base_model().named_modules()
        if "default" in getattr(layer, "lora_A", {})
    }


def test_stock_peft_gives_the_same_outputs(exported):
    model, folder, family = exported
    batch = text_batches()[0]
    expected = outputs(model, batch)
    again = PeftModel.from_pretrained(make(family), folder)
    torch.testing.assert_close(outputs(again, batch), expected, atol=1e-5, rtol=1e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(outputs(merged, batch), expected, atol=1e-5, rtol=1e-5)


def test_one_alpha_over_one_rank_from_the_configuration(exported):
    """vLLM and SGLang use the global alpha / r and ignore patterns."""
    model, folder, _ = exported
    settings, tensors = read(folder)
    for name, expected in products(model).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        product = settings["lora_alpha"] / settings["r"] * b @ a
        torch.testing.assert_close(product, expected, atol=1e-6, rtol=1e-5)


def test_one_alpha_over_the_rank_of_each_tensor(exported):
    """llama.cpp uses alpha / rank of each tensor: equal only if all ranks are."""
    _, folder, _ = exported
    settings, tensors = read(folder)
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    assert ranks == {settings["r"]}


def test_every_tensor_has_a_known_name_and_a_partner(exported):
    model, folder, family = exported
    _, tensors = read(folder)
    plain = dict(make(family).named_modules())
    for name in tensors:
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert match and match[1] in plain
        partner = "lora_B" if match[2] == "A" else "lora_A"
        assert name.replace(f"lora_{match[2]}", partner) in tensors


def test_configuration_is_plain(exported):
    _, folder, family = exported
    settings, _ = read(folder)
    assert settings.keys() == LoraConfig().to_dict().keys() - {"runtime_config"}
    assert isinstance(settings["lora_alpha"], int)
    assert not settings["rank_pattern"] and not settings["alpha_pattern"]
    assert not settings["use_rslora"] and not settings["use_dora"]
    assert settings["modules_to_save"] is None and settings["bias"] == "none"
    assert settings["init_lora_weights"] is True and settings["inference_mode"] is True
    assert settings["fan_in_fan_out"] == (family == "gpt2")
    # SGLang rejects names with a prefix.
    assert settings["target_modules"] and not any("." in x for x in settings["target_modules"])


def test_bare_names_reach_exactly_the_layers_with_tensors(exported):
    _, folder, family = exported
    settings, tensors = read(folder)
    named = {name.rpartition(".lora_")[0] for name in tensors}
    reached = {
        f"base_model.model.{name}"
        for name, _ in make(family).named_modules()
        if name.rpartition(".")[2] in settings["target_modules"]
    }
    assert reached == named


def test_shared_projections_stay_shared(tmp_path):
    """llama.cpp fuses the adapters of q, k and v only if their A are equal."""
    lora = config(alpha_pattern={"q_proj": 3})
    model = ipa_hf.get_ipa_model(make("llama"), lora, text_batches(), scaling=0.5, progress=False)
    ipa_hf.export_lora(model, tmp_path)
    _, tensors = read(tmp_path)
    k, v = (
        tensors[f"base_model.model.model.layers.0.self_attn.{x}_proj.lora_A.weight"] for x in "kv"
    )
    assert torch.equal(k, v)


def test_training_continues_from_an_export(exported):
    _, folder, family = exported
    loaded = ipa_hf.load_adapter(make(family), folder, is_trainable=True)
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    adapted = {f"base_model.model.{name}" for name in find_metadata(loaded).layers}
    assert adapted <= {name.partition(".lora_B.")[0] for name in trainable}
    assert not any(name.partition(".lora_A.")[0] in adapted for name in trainable if "_A" in name)


@pytest.mark.parametrize(
    "lora",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}],
)
def test_unsupported_parts_are_refused(tmp_path, lora):
    batches = text_batches()
    model = ipa_hf.get_ipa_model(make("llama"), config(**lora), batches, progress=False)
    with pytest.raises(SettingError, match=f"{next(iter(lora))}.*merge_and_unload"):
        ipa_hf.export_lora(model, tmp_path)


@pytest.mark.parametrize(
    "lora",
    [
        {"alora_invocation_tokens": [3]},
        {"layer_replication": [(0, 2), (1, 2)]},
        {"ensure_weight_tying": True},
        {"loftq_config": {"loftq_bits": 4}},
        {"use_bdlora": BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2)},
    ],
    ids=lambda lora: next(iter(lora)),
)
def test_fields_beyond_plain_lora_are_refused_by_name(tmp_path, lora):
    model = get_peft_model(make("llama"), config())
    for field, value in lora.items():
        setattr(model.peft_config["default"], field, value)
    with pytest.raises(SettingError, match=f"{next(iter(lora))}.*merge_and_unload"):
        ipa_hf.export_lora(model, tmp_path)


@dataclasses.dataclass
class NextVariant(LoraConfig):
    """A configuration with a field of a later PEFT version."""

    use_next: bool = False


def test_the_next_variant_is_refused_too(tmp_path):
    lora = NextVariant(r=4, target_modules=["q_proj"], use_next=True)
    model = get_peft_model(make("llama"), lora)
    with pytest.raises(SettingError, match="use_next"):
        ipa_hf.export_lora(model, tmp_path)
    with pytest.raises(SettingError, match="use_next"):
        ipa_hf.initialize_lora_ipa_weights(model, text_batches())


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "up_proj"], ["gate_proj"]])
def test_stacked_layers_are_complete(tmp_path, targets):
    """SGLang stacks q, k, v and gate, up: it needs an adapter for each layer of a stack."""
    model = get_peft_model(make("llama"), config(target_modules=targets))
    train(model, text_batches())
    ipa_hf.export_lora(model, tmp_path)
    settings, tensors = read(tmp_path)
    stacks = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]
    expected = set().union(*(stack for stack in stacks if stack & set(targets)))
    assert set(settings["target_modules"]) == expected
    assert {name.split(".")[-3] for name in tensors} == expected
    again = PeftModel.from_pretrained(make("llama"), tmp_path)
    batch = text_batches()[0]
    torch.testing.assert_close(outputs(again, batch), outputs(model, batch), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "k_proj", "up_proj"]])
def test_completed_stacks_share_A(tmp_path, targets):
    """llama.cpp fuses the adapters of a stack only if their A are equal."""
    lora = config(target_modules=targets)
    model = ipa_hf.get_ipa_model(make("llama"), lora, text_batches(), progress=False)
    train(model, text_batches())
    ipa_hf.export_lora(model, tmp_path)
    _, tensors = read(tmp_path)
    for stack in (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]):
        of_stack = [{n: x for n, x in tensors.items() if f".{leaf}.lora_A" in n} for leaf in stack]
        for first, *others in zip(*(part.values() for part in of_stack), strict=True):
            assert first.any() and all(torch.equal(first, other) for other in others)
    added = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} - {*targets}
    assert not any(
        tensor.any()
        for name, tensor in tensors.items()
        if name.split(".")[-3] in added and ".lora_B." in name
    )


def test_a_table_padded_beyond_the_vocabulary_is_no_resize(tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    padded = torch.nn.Embedding(128, 16)
    padded.weight.data[:64] = base.model.embed_tokens.weight.data
    base.model.embed_tokens = padded
    ipa_hf.export_lora(get_peft_model(base, config()), tmp_path / "padded")
    assert (tmp_path / "padded" / "adapter_model.safetensors").exists()


def test_resized_embeddings_are_refused(tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    ipa_hf.export_lora(get_peft_model(base, config()), tmp_path / "plain")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(SettingError, match="64 embeddings .* got 70"):
        ipa_hf.export_lora(get_peft_model(base, config()), tmp_path / "resized")
