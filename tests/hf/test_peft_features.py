"""PEFT's newer features on initialized adapters, each beside stock behavior."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import ipa_hf
from ipa_hf.adapter_metadata import find_metadata
from ipa_hf.lora_layers import lora_A_and_B, lora_layers

from .models import config, make, outputs, train


def initialized(batches, base=None, **settings):
    lora = config(**settings)
    return ipa_hf.get_ipa_model(base or make("llama"), lora, batches, progress=False)


@pytest.fixture
def folders(batches, tmp_path):
    """Return the folders of two trained adapters, the second one of another rank."""
    for name, rank in (("first", 4), ("second", 2)):
        model = initialized(batches, r=rank, lora_alpha=2 * rank)
        train(model, batches)
        model.save_pretrained(tmp_path / name)
    return tmp_path / "first", tmp_path / "second"


def stock(folder):
    return PeftModel.from_pretrained(make("llama"), folder)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "prepared-for-compilation"])
def test_hotswap(folders, batches, compiled):
    first, second = folders
    model = ipa_hf.load_adapter(make("llama"), first)
    if compiled:
        prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
        runs = torch.compile(model, backend="eager")
    else:
        runs = model
    close(outputs(runs, batches[0]), outputs(stock(first), batches[0]))
    # The preparation replaces the matrices by padded ones: metadata is dropped, never false.
    assert (find_metadata(model) is None) == compiled
    hotswap_adapter(model, str(second), adapter_name="default")
    close(outputs(runs, batches[0]), outputs(stock(second), batches[0]))
    assert find_metadata(model) is None
    hotswap_adapter(model, str(first), adapter_name="default")
    close(outputs(runs, batches[0]), outputs(stock(first), batches[0]))


def test_lorafa_trains_B_as_it_trains_that_of_stock_lora(batches):
    """LoRA-FA freezes A by itself: an initialized A stays as it is, and B trains alike."""
    model = initialized(batches, lora_dropout=0.0)
    other = copy.deepcopy(model)
    frozen = {name: x.lora_A["default"].weight.clone() for name, x in layers(model).items()}
    steps(create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2), model, batches)
    steps(create_lorafa_optimizer(other, r=4, lora_alpha=8, lr=1e-2), other, batches)
    for name, layer in layers(model).items():
        a, b = lora_A_and_B(layer, "default")
        assert torch.equal(a, frozen[name])
        assert b.any() and torch.equal(b, lora_A_and_B(layers(other)[name], "default")[1])


def layers(model):
    return lora_layers(model, "default")


def steps(optimizer, model, batches):
    model.train()
    for batch in batches:
        model(**batch)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_low_cpu_mem_usage(folders, batches):
    model = PeftModel.from_pretrained(make("llama"), folders[0], low_cpu_mem_usage=True)
    close(outputs(model, batches[0]), outputs(stock(folders[0]), batches[0]))
    ipa_hf.freeze_projections(model)
    fresh = get_peft_model(make("llama"), config(), low_cpu_mem_usage=True)
    ipa_hf.initialize_lora_ipa_weights(fresh, batches, progress=False)
    assert find_metadata(fresh) == find_metadata(initialized(batches))


def test_loading_while_another_adapter_trains(folders, batches):
    model = initialized(batches)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    steps(optimizer, model, batches)
    trained = outputs(model, batches[0])
    ipa_hf.load_adapter(model, folders[0], adapter_name="loaded")
    close(outputs(model, batches[0]), trained)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_B.default" in name for name in trainable)
    before = {name: x.lora_B["default"].weight.clone() for name, x in layers(model).items()}
    steps(optimizer, model, batches)
    assert all(
        not torch.equal(x.lora_B["default"].weight, before[name])
        for name, x in layers(model).items()
    )
    model.set_adapter("loaded")
    close(outputs(model, batches[0]), outputs(stock(folders[0]), batches[0]))


def test_modules_to_save_beside_a_frozen_A(batches, tmp_path):
    model = initialized(batches, modules_to_save=["lm_head"])
    train(model, batches)
    parts = {
        name.split(".default")[0].split(".")[-1]
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert parts == {"lora_B", "modules_to_save"}
    model.save_pretrained(tmp_path)
    close(outputs(stock(tmp_path), batches[0]), outputs(model, batches[0]))
    again = ipa_hf.load_adapter(make("llama"), tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def tied():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        shape = copy.deepcopy(make("llama").config)
        shape.tie_word_embeddings = True
        return transformers.LlamaForCausalLM(shape).eval()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tied:UserWarning")
def test_tied_embeddings_as_targets(batches, tmp_path):
    settings = {"target_modules": ["q_proj", "embed_tokens"]}
    with pytest.warns(UserWarning, match="keep LoRA's random A.*embed_tokens"):
        model = initialized(batches, tied(), **settings)
    base = tied()
    close(outputs(model, batches[0]), outputs(base, batches[0]))
    train(model, batches)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tied(), tmp_path)
    close(outputs(again, batches[0]), outputs(model, batches[0]))
    plain = get_peft_model(tied(), LoraConfig(r=4, **settings))
    assert set(lora_layers(plain, "default")) == set(layers(model))
