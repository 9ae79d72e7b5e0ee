"""The metadata of an adapter belongs to a model and an adapter name."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter

import ipa_hf
from ipa_hf.adapter_metadata import FILE_NAME, AdapterMetadata, find_metadata
from ipa_hf.lora_layers import lora_A_and_B, lora_layers

from .models import config, make, outputs, text_batches, train


def initialized(batches, **options):
    return ipa_hf.get_ipa_model(make("llama"), config(), batches, progress=False, **options)


def files(folder):
    return sorted(str(path.relative_to(folder).parent) for path in folder.rglob(FILE_NAME))


def test_a_reference_adapter_under_the_same_configuration_has_none(batches, tmp_path):
    model = initialized(batches)
    model.add_adapter("reference", model.peft_config["default"])  # as TRL's DPO does
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == ["."]
    assert find_metadata(model, "reference") is None
    assert type(model.peft_config["default"]) is LoraConfig


def test_each_adapter_has_its_own(batches, tmp_path):
    model = initialized(batches)
    model.add_adapter("second", config())
    ipa_hf.initialize_lora_ipa_weights(
        model, batches, adapter_name="second", trainable=True, progress=False
    )
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == [".", "second"]
    assert AdapterMetadata.read(tmp_path).frozen
    assert not AdapterMetadata.read(tmp_path / "second").frozen
    model.save_pretrained(tmp_path / "selected", selected_adapters=["second"])
    assert files(tmp_path / "selected") == ["second"]
    model.save_pretrained(tmp_path / "elsewhere", is_main_process=False)
    assert not (tmp_path / "elsewhere").exists() or not files(tmp_path / "elsewhere")


def test_a_deleted_adapter_leaves_none(batches, tmp_path):
    model = initialized(batches)
    model.save_pretrained(tmp_path)
    shared = model.peft_config["default"]
    model.add_adapter("other", config())
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", shared)
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == []  # that of the deleted adapter is removed


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_the_model_save_themselves(batches, tmp_path, duplicate):
    model = initialized(batches)
    other = duplicate(model)
    train(other, batches)
    other.save_pretrained(tmp_path)
    assert AdapterMetadata.read(tmp_path) == find_metadata(model)
    stock = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert torch.equal(outputs(stock, batches[0]), outputs(other, batches[0]))


def test_hotswap_leaves_no_metadata_of_the_replaced_adapter(batches, tmp_path):
    model = initialized(batches)
    other = ipa_hf.get_ipa_model(
        make("llama"), config(), text_batches(1)[:1], scaling=0.25, progress=False
    )
    other.save_pretrained(tmp_path / "other")
    assert find_metadata(model) is not None
    hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default")
    assert find_metadata(model) is None
    model.save_pretrained(tmp_path / "swapped")
    assert files(tmp_path / "swapped") == []


def test_half_precision_keeps_it(batches):
    model = initialized(batches)
    assert find_metadata(model.to(torch.bfloat16)) is not None


def test_a_compiled_model_saves_it(batches, tmp_path):
    torch.compile(initialized(batches), backend="eager").save_pretrained(tmp_path)
    assert files(tmp_path) == ["."]


METHODS = ["svd", "linear", "cat", "ties", "dare_linear", "magnitude_prune"]


def over_one_projection(batches, **settings):
    """Return a model with two trained adapters of one P, and the sum of their changes."""
    lora = config(**settings)
    model = ipa_hf.get_ipa_model(make("llama"), lora, batches, progress=False)
    train(model, batches)
    model.add_adapter("second", config(**settings | {"lora_alpha": 4}))
    scales = find_metadata(model).layers
    for name, layer in lora_layers(model, "second").items():
        first, second = (lora_A_and_B(layer, x) for x in ("default", "second"))
        assert name in scales
        with torch.no_grad():
            second[0].copy_(first[0])
            second[1].normal_(std=0.1)
    return model


def delta(layer, *adapters, weights=(0.5, -2.0)):
    return sum(
        weight * layer.get_delta_weight(adapter).double()
        for weight, adapter in zip(weights, adapters, strict=False)
    )


@pytest.mark.parametrize("method", METHODS)
def test_weighted_adapters_are_saved(batches, tmp_path, method):
    model = initialized(batches)
    model.add_adapter("second", config())
    model.add_weighted_adapter(
        ["default", "second"], [0.7, 0.3], "sum", combination_type=method, density=0.5
    )
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == ["."]  # the A of the sum is another
    stock = PeftModel.from_pretrained(make("llama"), tmp_path / "sum")
    model.set_adapter("sum")
    assert (outputs(stock, batches[0]) - outputs(model, batches[0])).abs().max() < 1e-6


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_adapters_over_one_projection_are_added_exactly(batches, tmp_path, settings):
    model = over_one_projection(batches, **settings)
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum")
    for layer in lora_layers(model, "sum").values():
        expected = delta(layer, "default", "second")
        found = layer.get_delta_weight("sum").double()
        assert (found - expected).norm() / expected.norm() < 1e-6
        assert torch.equal(lora_A_and_B(layer, "sum")[0], lora_A_and_B(layer, "default")[0])
    model.save_pretrained(tmp_path)
    assert AdapterMetadata.read(tmp_path / "sum") == find_metadata(model)
    model.set_adapter("sum")
    trained = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_B"}


def test_the_sum_is_that_of_stock_peft(batches):
    model = over_one_projection(batches)
    stock = copy.deepcopy(model)
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum")
    stock.base_model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum", "svd")
    model.set_adapter("sum")
    stock.set_adapter("sum")
    assert (outputs(model, batches[0]) - outputs(stock, batches[0])).abs().max() < 1e-5


def test_other_methods_are_those_of_stock_peft(batches):
    for options in ({"combination_type": "linear"}, {"svd_rank": 3}, {"combination_type": "cat"}):
        model = over_one_projection(batches)
        stock = copy.deepcopy(model)
        arguments = (["default", "second"], [0.5, 2.0], "sum")
        model.add_weighted_adapter(*arguments, **options)
        stock.base_model.add_weighted_adapter(*arguments, **options)
        for name, layer in lora_layers(model, "sum").items():
            other = lora_layers(stock, "sum")[name]
            for part, its in zip(
                lora_A_and_B(layer, "sum"), lora_A_and_B(other, "sum"), strict=True
            ):
                assert torch.equal(part, its)
        assert find_metadata(model, "sum") is None


def test_layers_of_one_adapter_alone_are_left_to_peft(batches):
    model = ipa_hf.get_ipa_model(make("llama"), config(), batches, progress=False)
    model.add_adapter("second", config(target_modules=["q_proj", "o_proj"]))
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    assert find_metadata(model, "sum") is None
    names = {name.rpartition(".")[2] for name in lora_layers(model, "sum")}
    assert names == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "o_proj"}
