"""Checkpoints: small, complete, and refused where they do not fit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

timm = pytest.importorskip("timm", reason="needs timm on the path: make test-timm")

import ipa_timm
from ipa_core.errors import FileFormatError, SettingError, ShapeError

from .test_adapting import SMALL, adapt, beit, convnet, loader, trained, vit


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("make", [vit, beit, convnet])
def test_round_trip(make, trainable, tmp_path):
    model = make()
    again = make()
    again.load_state_dict(model.state_dict())
    adapt(model, trainable=trainable)
    trained(model)
    path = tmp_path / "adapter.safetensors"
    ipa_timm.save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    ipa_timm.load(again, path)
    images = loader(1)[0][0]
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model(images))
    wants = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert wants[0] == wants[1]
    losses = trained(again)
    assert losses[-1] < losses[0]


def test_holds_p_b_and_the_head_and_no_more(tmp_path):
    model = vit()
    projectors = adapt(model)
    ipa_timm.save(model, tmp_path / "a")
    state = load_file(tmp_path / "a")
    own = sum(p.components.numel() for p in projectors.values()) + sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    marks = sum(key.endswith((".projection", ".scale", ".trainable")) for key in state)
    assert sum(value.numel() for value in state.values()) == own + marks
    assert {key for key in state if key.startswith("head.")} == {
        "head.head.weight",
        "head.head.bias",
    }


def test_loading_replaces_an_adapter(tmp_path):
    model = vit()
    adapt(model)
    ipa_timm.save(model, tmp_path / "a")
    trained(model)
    ipa_timm.load(model, tmp_path / "a")
    assert not any(p.any() for n, p in model.named_parameters() if ".lora_B." in n)


def test_nothing_to_save(tmp_path):
    with pytest.raises(SettingError, match="expected an adapter"):
        ipa_timm.save(vit(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_another_number_of_classes(tmp_path):
    model = vit()
    adapt(model)
    ipa_timm.save(model, tmp_path / "a")
    other = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ShapeError, match=r"'head.bias' of shape \(5,\), got \(3,\); create the mo"):
        ipa_timm.load(other, tmp_path / "a")
    assert other.state_dict().keys() == before.keys()


def test_another_architecture(tmp_path):
    model = vit()
    adapt(model)
    ipa_timm.save(model, tmp_path / "a")
    with pytest.raises(FileFormatError, match="adapter of resnet18, got one of vit_tiny_patch16_"):
        ipa_timm.load(convnet(), tmp_path / "a")


def test_other_files(tmp_path):
    path = tmp_path / "a"
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(FileFormatError, match="expected an adapter that ipa_timm.save wrote"):
        ipa_timm.load(vit(), path)
    save_file({"x": torch.ones(1)}, path, {"format": "ipa-timm-adapter", "version": "2"})
    with pytest.raises(FileFormatError, match="expected format version 1 or older, got 2"):
        ipa_timm.load(vit(), path)
    path.write_bytes(b"no such thing")
    with pytest.raises(FileFormatError, match="expected a safetensors file"):
        ipa_timm.load(vit(), path)
    with pytest.raises(FileNotFoundError):
        ipa_timm.load(vit(), tmp_path / "none")
