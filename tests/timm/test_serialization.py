"""Adapter files: contents, round trip, and refusal of files that do not fit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

timm = pytest.importorskip("timm", reason="needs timm on the path: make test-timm")

import ipa_timm
import ipa_torch
from ipa_core.errors import FileFormatError, SettingError, ShapeError

from .test_adapters import SMALL, adapt, beit, convnet, loader, trained, vit


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("make", [vit, beit, convnet])
def test_round_trip(make, trainable, tmp_path):
    model = make()
    loaded = make()
    loaded.load_state_dict(model.state_dict())
    adapt(model, trainable=trainable)
    trained(model)
    path = tmp_path / "adapter.safetensors"
    ipa_timm.save_adapter(model, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    ipa_timm.load_adapter(loaded, path)
    images = loader(1)[0][0]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), model(images))
    trainable_names = [
        {n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)
    ]
    assert trainable_names[0] == trainable_names[1]
    losses = trained(loaded)
    assert losses[-1] < losses[0]


def test_holds_p_b_and_the_head_and_no_more(tmp_path):
    model = vit()
    projectors = adapt(model)
    ipa_timm.save_adapter(model, tmp_path / "a")
    state = load_file(tmp_path / "a")
    expected = sum(p.components.numel() for p in projectors.values()) + sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    marks = sum(
        key.endswith(("format_version", ".projection", ".scale", ".trainable")) for key in state
    )
    assert sum(value.numel() for value in state.values()) == expected + marks
    assert {key for key in state if key.startswith("classifier.")} == {
        "classifier.head.weight",
        "classifier.head.bias",
    }


def test_loading_replaces_an_adapter(tmp_path):
    model = vit()
    adapt(model)
    ipa_timm.save_adapter(model, tmp_path / "a")
    trained(model)
    ipa_timm.load_adapter(model, tmp_path / "a")
    assert not any(p.any() for n, p in model.named_parameters() if ".lora_B." in n)


def test_nothing_to_save(tmp_path):
    with pytest.raises(SettingError, match="expected an adapter"):
        ipa_timm.save_adapter(vit(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_another_number_of_classes(tmp_path):
    model = vit()
    adapt(model)
    ipa_timm.save_adapter(model, tmp_path / "a")
    other = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ShapeError, match=r"'head.bias' of shape \(5,\), got \(3,\); create the mo"):
        ipa_timm.load_adapter(other, tmp_path / "a")
    assert other.state_dict().keys() == before.keys()


def test_another_architecture(tmp_path):
    model = vit()
    adapt(model)
    ipa_timm.save_adapter(model, tmp_path / "a")
    with pytest.raises(FileFormatError, match="adapter of resnet18, got one of vit_tiny_patch16_"):
        ipa_timm.load_adapter(convnet(), tmp_path / "a")


def test_other_files(tmp_path):
    path = tmp_path / "a"
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(FileFormatError, match="expected format 'ipa-adapter-tensors', got None"):
        ipa_timm.load_adapter(vit(), path)
    save_file({"x": torch.ones(1)}, path, {"format": "ipa-adapter-tensors", "format_version": "2"})
    with pytest.raises(FileFormatError, match="expected format version 1, got '2'"):
        ipa_timm.load_adapter(vit(), path)
    model = vit()
    adapt(model)
    ipa_torch.save_adapter(model, path)
    with pytest.raises(FileFormatError, match="one of ipa_torch; load it with ipa_torch.load_ad"):
        ipa_timm.load_adapter(vit(), path)
    ipa_timm.save_adapter(model, path)
    with pytest.raises(FileFormatError, match="one of ipa_timm; load it with ipa_timm.load_ada"):
        ipa_torch.load_adapter(vit(), path)
    path.write_bytes(b"no such thing")
    with pytest.raises(FileFormatError, match="expected a safetensors file"):
        ipa_timm.load_adapter(vit(), path)
    with pytest.raises(FileNotFoundError):
        ipa_timm.load_adapter(vit(), tmp_path / "none")
