"""Documented behavior of PEFT models holds for initialized models."""

import pytest
import torch

import ipa_hf

from .models import base_state, config, make, outputs, same_state, train


@pytest.fixture
def model(llama, batches):
    """Return a Llama with two trained adapters: frozen 'default', and 'free', which is active."""
    model = ipa_hf.get_ipa_model(llama, config(), batches, progress=False)
    train(model, batches, rate=0.1)
    model.add_adapter("free", config(r=2))
    ipa_hf.initialize_lora_ipa_weights(
        model, batches, adapter_name="free", trainable=True, progress=False
    )
    model.set_adapter("free")
    train(model, batches, rate=0.1)
    return model


def with_adapter(model, name, batch):
    model.set_adapter(name)
    return outputs(model, batch)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_adapters_differ_and_can_be_switched_off(model, batches):
    default, free = (with_adapter(model, name, batches[0]) for name in ("default", "free"))
    assert (default - free).abs().max() > 1e-3
    with model.disable_adapter():
        close(outputs(model, batches[0]), outputs(make("llama"), batches[0]))


def test_merge_and_back(model, batches):
    expected = outputs(model, batches[0])
    model.merge_adapter()
    close(outputs(model, batches[0]), expected)
    model.unmerge_adapter()
    close(outputs(model, batches[0]), expected)


def test_merge_and_unload(model, batches):
    expected = with_adapter(model, "default", batches[0])
    merged = model.merge_and_unload()
    assert type(merged) is type(make("llama"))
    close(outputs(merged, batches[0]), expected)


def test_unload_gives_the_base_model_back(model):
    assert same_state(base_state(model.unload()), base_state(make("llama")))


def test_mixed_batches(model, batches):
    expected = {name: with_adapter(model, name, batches[0]) for name in ("default", "free")}
    expected["__base__"] = outputs(make("llama"), batches[0])
    names = ["default", "free", "__base__"] * 2
    mixed = outputs(model, batches[0] | {"adapter_names": names})
    for row, name in enumerate(names):
        close(mixed[row], expected[name][row])


def test_deleting_one_leaves_the_other(model, batches):
    expected = with_adapter(model, "default", batches[0])
    model.delete_adapter("free")
    close(outputs(model, batches[0]), expected)
    assert not any("free" in name for name, _ in model.named_parameters())


def test_weighted_combination(model, batches):
    expected = with_adapter(model, "free", batches[0])
    model.add_weighted_adapter(["default", "free"], [0.0, 1.0], "both", combination_type="cat")
    close(with_adapter(model, "both", batches[0]), expected)


def test_generation(model):
    ids = torch.tensor([[3, 5, 7]])
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    assert generated.shape[1] > 3


@pytest.mark.filterwarnings("ignore:.*_checkpointing:FutureWarning")
def test_gradient_checkpointing(batches, llama):
    plain = ipa_hf.get_ipa_model(make("llama"), config(), batches, progress=False)
    llama.gradient_checkpointing_enable()
    saving = ipa_hf.get_ipa_model(llama, config(), batches, progress=False)
    for model in (plain, saving):
        train(model, batches)
    close(outputs(saving, batches[0]), outputs(plain, batches[0]))
