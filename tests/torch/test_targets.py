import pytest
from torch import nn

from ipa_core.errors import SettingError
from ipa_torch import LayerError, select_layers

from .models import Transformer, mlp


def test_suffixes_as_peft_means_them():
    assert list(select_layers(Transformer(), ["q", "up.1"])) == [
        "attention.0.q",
        "attention.1.q",
        "up.1",
    ]
    assert list(select_layers(Transformer(blocks=1), ["attention.0.q", "p.0"])) == ["attention.0.q"]


def test_regular_expression_is_for_the_whole_name():
    assert list(select_layers(Transformer(), r"attention\.\d\.[qv]")) == [
        "attention.0.q",
        "attention.0.v",
        "attention.1.q",
        "attention.1.v",
    ]
    with pytest.raises(LayerError):
        select_layers(Transformer(), "q")
    with pytest.raises(SettingError, match="regular expression"):
        select_layers(Transformer(), "(")


def test_callable_decides():
    model = mlp(4, 8, 2)
    assert list(select_layers(model, lambda name, layer: isinstance(layer, nn.ReLU))) == ["1"]


def test_all_linear_leaves_out_the_head():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    names = list(select_layers(model))
    assert "classifier" not in names
    assert len(names) == 7


def test_all_linear_leaves_out_both_heads_of_a_distilled_model():
    model = mlp(4, 4, 4, 4)
    model.get_classifier = lambda: (model[2], model[4])
    assert list(select_layers(model)) == ["0"]


def test_all_linear_knows_conv1d_and_custom_layers():
    transformers = pytest.importorskip("transformers")

    class Quantized(nn.Module):
        in_features, out_features = 8, 4

        def forward(self, x):
            return x[..., :4]

    model = nn.Sequential(transformers.pytorch_utils.Conv1D(8, 6), Quantized(), nn.ReLU())
    assert list(select_layers(model)) == ["0", "1"]


def test_all_linear_takes_no_block_of_convolutions_for_a_layer():
    class Block(nn.Sequential):
        in_features, out_features = 8, 4

    model = nn.Sequential(Block(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)), nn.Linear(4, 2))
    assert list(select_layers(model)) == ["1"]


def test_all_linear_takes_an_adapted_layer_as_one():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Transformer(blocks=1), peft.LoraConfig(target_modules=["q"], r=2))
    names = list(select_layers(model))
    assert "base_model.model.attention.0.q" in names
    assert not any("lora_" in name or "base_layer" in name for name in names)


def test_nothing_linear():
    with pytest.raises(LayerError, match="linear layers"):
        select_layers(nn.Sequential(nn.ReLU()))
