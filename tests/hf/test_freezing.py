import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import ipa_hf
from ipa_core import FileFormatError, SettingError

from .models import config, make, outputs, train


@pytest.fixture
def frozen(llama, batches):
    return ipa_hf.get_ipa_model(llama, config(), batches, progress=False)


def flags(model, adapter="default"):
    """Return the ``requires_grad`` of A and B, without a part whose layers differ."""
    values = {"A": set(), "B": set()}
    for name, parameter in model.named_parameters():
        for part in values:
            if f"lora_{part}.{adapter}." in name:
                values[part].add(parameter.requires_grad)
    return {part: flags.pop() for part, flags in values.items() if len(flags) == 1}


def lora_A_and_B(model, part="A", adapter="default"):
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if f"lora_{part}.{adapter}." in name
    }


FROZEN, TRAINABLE, OFF = ({"A": a, "B": b} for a, b in ((0, 1), (1, 1), (0, 0)))


class TestFlags:
    def test_half_of_the_matrices_train(self, frozen):
        assert flags(frozen) == FROZEN

    def test_trainable_if_asked_for(self, llama, batches):
        model = ipa_hf.get_ipa_model(llama, config(), batches, trainable=True, progress=False)
        assert flags(model) == TRAINABLE

    def test_initialized_again_as_trainable(self, frozen, batches):
        ipa_hf.initialize_lora_ipa_weights(frozen, batches, trainable=True, progress=False)
        assert flags(frozen) == TRAINABLE
        frozen.set_adapter("default")
        assert flags(frozen) == TRAINABLE

    def test_training_moves_b_and_not_a(self, frozen, batches):
        a, b = lora_A_and_B(frozen), lora_A_and_B(frozen, "B")
        train(frozen, batches)
        assert all(torch.equal(a[name], value) for name, value in lora_A_and_B(frozen).items())
        assert not any(
            torch.equal(b[name], value) for name, value in lora_A_and_B(frozen, "B").items()
        )

    def test_set_adapter(self, frozen):
        frozen.add_adapter("other", config())
        frozen.set_adapter("other")
        assert (flags(frozen), flags(frozen, "other")) == (OFF, TRAINABLE)
        frozen.set_adapter("default")
        assert (flags(frozen), flags(frozen, "other")) == (FROZEN, OFF)

    def test_disable_adapter(self, frozen, batches):
        with frozen.disable_adapter():
            outputs(frozen, batches[0])
        assert flags(frozen) == FROZEN

    def test_layers_switched_off_and_on(self, frozen):
        frozen.base_model.disable_adapter_layers()
        frozen.base_model.enable_adapter_layers()
        assert flags(frozen) == FROZEN

    def test_set_requires_grad(self, frozen):
        frozen.set_requires_grad("default", True)
        assert flags(frozen) == FROZEN

    def test_another_adapter_is_deleted(self, frozen):
        frozen.add_adapter("other", config())
        frozen.set_adapter("other")
        frozen.set_adapter("default")
        frozen.delete_adapter("other")
        assert flags(frozen) == FROZEN

    def test_deleted_adapter_leaves_no_flags(self, frozen, batches):
        frozen.add_adapter("other", config())
        frozen.set_adapter("other")
        frozen.delete_adapter("default")
        frozen.add_adapter("default", config())
        frozen.set_adapter("default")
        assert flags(frozen) == TRAINABLE

    def test_one_frozen_and_one_trainable(self, frozen, batches):
        frozen.add_adapter("free", config())
        ipa_hf.initialize_lora_ipa_weights(
            frozen, batches, adapter_name="free", trainable=True, progress=False
        )
        frozen.set_adapter("free")
        assert flags(frozen, "free") == TRAINABLE
        frozen.set_adapter("default")
        assert flags(frozen) == FROZEN

    def test_a_disabled_pass_after_training_relearns_nothing(self, frozen, batches):
        train(frozen, batches)
        a = lora_A_and_B(frozen)
        with frozen.disable_adapter():
            outputs(frozen, batches[-1])
        assert all(torch.equal(a[name], value) for name, value in lora_A_and_B(frozen).items())

    def test_copies_stay_frozen(self, frozen):
        other = copy.deepcopy(frozen)
        other.set_adapter("default")
        assert flags(other) == FROZEN


class TestSaving:
    def test_continues_frozen(self, frozen, batches, tmp_path):
        train(frozen, batches)
        frozen.save_pretrained(tmp_path)
        again = ipa_hf.load_adapter(make("llama"), tmp_path, is_trainable=True)
        assert flags(again) == FROZEN
        again.set_adapter("default")
        assert flags(again) == FROZEN
        torch.testing.assert_close(outputs(again, batches[0]), outputs(frozen, batches[0]))

    def test_second_generation(self, frozen, tmp_path):
        frozen.save_pretrained(tmp_path / "first")
        ipa_hf.load_adapter(make("llama"), tmp_path / "first").save_pretrained(tmp_path / "second")
        files = [(tmp_path / x / "ipa_adapter.json").read_text() for x in ("first", "second")]
        assert files[0] == files[1]
        assert (
            flags(ipa_hf.load_adapter(make("llama"), tmp_path / "second", is_trainable=True))
            == FROZEN
        )

    def test_for_inference(self, frozen, tmp_path):
        frozen.save_pretrained(tmp_path)
        assert flags(ipa_hf.load_adapter(make("llama"), tmp_path)) == OFF

    def test_trainable_stays_trainable(self, llama, batches, tmp_path):
        model = ipa_hf.get_ipa_model(llama, config(), batches, trainable=True, progress=False)
        model.save_pretrained(tmp_path)
        assert flags(ipa_hf.load_adapter(make("llama"), tmp_path, is_trainable=True)) == TRAINABLE

    def test_stock_loading_and_freezing(self, frozen, tmp_path):
        frozen.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
        assert flags(model) == TRAINABLE
        assert flags(ipa_hf.freeze_projections(model)) == FROZEN

    def test_resumed_by_a_trainer(self, frozen, batches, tmp_path):
        train(frozen, batches)
        frozen.save_pretrained(tmp_path)
        b = lora_A_and_B(frozen, "B")
        train(frozen, batches)
        frozen.load_adapter(tmp_path, "default", is_trainable=True)
        assert all(torch.equal(b[name], value) for name, value in lora_A_and_B(frozen, "B").items())
        assert flags(frozen) == FROZEN

    def test_several_adapters(self, frozen, batches, tmp_path):
        frozen.add_adapter("free", config())
        ipa_hf.initialize_lora_ipa_weights(
            frozen, batches, adapter_name="free", trainable=True, progress=False
        )
        frozen.save_pretrained(tmp_path)
        again = ipa_hf.load_adapter(make("llama"), tmp_path, is_trainable=True)
        assert (
            ipa_hf.load_adapter(again, tmp_path / "free", adapter_name="free", is_trainable=True)
            is again
        )
        again.set_adapter("free")
        assert flags(again, "free") == TRAINABLE
        again.set_adapter("default")
        assert flags(again) == FROZEN

    def test_dora_magnitude(self, llama, batches, tmp_path):
        model = ipa_hf.get_ipa_model(llama, config(use_dora=True), batches, progress=False)
        train(model, batches)
        model.save_pretrained(tmp_path)
        again = ipa_hf.load_adapter(make("llama"), tmp_path, is_trainable=True)
        torch.testing.assert_close(outputs(again, batches[0]), outputs(model, batches[0]))
        magnitudes = [p for n, p in again.named_parameters() if "magnitude" in n]
        assert magnitudes and all(p.requires_grad for p in magnitudes)
        assert flags(again) == FROZEN

    def test_without_metadata(self, llama, tmp_path):
        get_peft_model(llama, config()).save_pretrained(tmp_path)
        with pytest.raises(FileFormatError, match="freeze_projections"):
            ipa_hf.load_adapter(make("llama"), tmp_path)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"format_version": 2', '"format_version": 9'),
            ('"format_version": 2', '"format_version": 1'),
            ("{", "["),
            ('"rank"', '"height"'),
        ],
    )
    def test_damaged_or_other_version(self, frozen, tmp_path, old, new):
        frozen.save_pretrained(tmp_path)
        path = tmp_path / "ipa_adapter.json"
        path.write_text(path.read_text().replace(old, new, 1))
        with pytest.raises(FileFormatError, match=r"ipa_adapter\.json"):
            ipa_hf.load_adapter(make("llama"), tmp_path)


def test_configuration_on_disk_is_stock(frozen, tmp_path):
    frozen.save_pretrained(tmp_path / "ours")
    get_peft_model(make("llama"), config()).save_pretrained(tmp_path / "stock")
    ours, stock = (LoraConfig.from_pretrained(tmp_path / x).to_dict() for x in ("ours", "stock"))
    assert ours == stock


def test_freezing_unknown_layers(frozen):
    with pytest.raises(SettingError, match="layer 'nowhere'"):
        ipa_hf.freeze_projections(frozen, layers=["nowhere"])
