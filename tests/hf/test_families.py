"""Each feature on a tiny random model of each family; docs/peft.md names these tests."""

import pytest
import torch
from peft import LoraConfig, PeftModel

import ipa_hf

from .families import FAMILIES
from .models import base_state, outputs, same_state, train

pytestmark = [
    # PEFT sets fan_in_fan_out for GPT-2, whose weights are transposed.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    # Mixtral's experts are fused: see test_default_targets.py.
    pytest.mark.filterwarnings("ignore:the default targets cover:UserWarning"),
]


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def prepared(family, **settings):
    lora = LoraConfig(**({"r": 4, "lora_alpha": 8} | settings))
    return ipa_hf.get_ipa_model(family.make(), lora, family.batches(), progress=False)


def lora_layers(model):
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if "default" in getattr(module, "lora_A", {})
    }


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_default_targets(family):
    layers = lora_layers(prepared(family))
    assert len(layers) == family.layers
    assert not any(word in name for name in layers for word in ("lm_head", "pooler", "gate."))


def test_outputs_start_as_the_base_model(family):
    model, batch = prepared(family), family.batches()[0]
    close(outputs(model, batch), outputs(family.make(), batch))
    assert same_state(base_state(model), base_state(family.make()))


def test_trains_frozen(family):
    model = prepared(family)
    before = {name: x.lora_A["default"].weight.clone() for name, x in lora_layers(model).items()}
    train(model, family.batches())
    assert all(
        torch.equal(x.lora_A["default"].weight, before[name])
        for name, x in lora_layers(model).items()
    )
    assert any(x.lora_B["default"].weight.any() for x in lora_layers(model).values())


def test_stock_peft_loads_it(family, tmp_path):
    model, batch = prepared(family), family.batches()[0]
    train(model, family.batches())
    model.save_pretrained(tmp_path)
    expected = outputs(model, batch)
    again = PeftModel.from_pretrained(family.make(), tmp_path)
    close(outputs(again, batch), expected)
    close(outputs(again.merge_and_unload(), batch), expected)


def test_rslora_and_ranks_export(family, tmp_path):
    names = [name.rpartition(".")[2] for name in lora_layers(prepared(family))]
    model = prepared(family, use_rslora=True, rank_pattern={names[0]: 2})
    batch = family.batches()[0]
    train(model, family.batches())
    ipa_hf.export_lora(model, tmp_path)
    close(outputs(PeftModel.from_pretrained(family.make(), tmp_path), batch), outputs(model, batch))


def test_dora(family, tmp_path):
    model, batch = prepared(family, use_dora=True), family.batches()[0]
    train(model, family.batches())
    model.save_pretrained(tmp_path)
    close(outputs(ipa_hf.load_adapter(family.make(), tmp_path), batch), outputs(model, batch))


def test_only_the_adapted_tower_learns():
    clip = FAMILIES["CLIP"]
    lora = LoraConfig(r=4, target_modules=r"vision_model.*\.(q|v)_proj")
    model = ipa_hf.get_ipa_model(clip.make(), lora, clip.batches(), progress=False)
    assert len(lora_layers(model)) == 4
    assert all(name.startswith("vision_model") for name in lora_layers(model))


def test_text_targets_leave_the_vision_tower_alone():
    layers = lora_layers(prepared(FAMILIES["Gemma-3"]))
    assert layers and all(".language_model." in name for name in layers)


def test_a_model_without_blocks_asks_for_targets():
    with pytest.raises(ValueError, match="target_modules"):
        ipa_hf.default_targets(torch.nn.Sequential(torch.nn.Linear(2, 2)))
