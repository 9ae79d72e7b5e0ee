"""Cases that break PEFT's EVA initialization work here, or fail with the layer's name."""

import pytest
import torch
import transformers
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import nn

import ipa_hf
from ipa_core import EmptyStreamError, ExactCovariance, NonFiniteError, RankError
from ipa_torch import LayerError, StoppingCriteria, fit_projectors

from .models import TARGETS, config, make, outputs, text_batches


def learned(model, lora, batches, **options):
    """Return the A of each layer after a check for full rank."""
    model = ipa_hf.get_ipa_model(model, lora, batches, progress=False, **options)
    weights = {
        name: module.lora_A["default"].weight
        for name, module in model.get_base_model().named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    for a in weights.values():
        assert torch.linalg.matrix_rank(a) == a.shape[0]
    return weights


class Net(nn.Module):
    """A plain torch model."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.convolution = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.second(hidden.transpose(0, 1))  # not contiguous


def rows(count=4):
    return [torch.randn(5, 6, 8) for _ in range(count)]


@pytest.mark.parametrize("padding", [9, 10])
def test_fewer_valid_tokens_than_the_rank(llama, padding):
    learned(llama, config(), text_batches(count=8, size=1, padding=padding) + text_batches())


def test_a_first_batch_smaller_than_the_rank(llama):
    learned(llama, config(), text_batches(count=1, size=1, length=2, padding=0) + text_batches())


def test_nan_names_the_layer(llama, batches):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layer 'model\.layers\.1\.mlp\.down_proj'"):
        learned(llama, config(), batches)


def test_rank_above_the_features_names_the_layer(llama, batches):
    with pytest.raises(RankError, match=r"layer 'model\.layers\.0\.self_attn\.q_proj'"):
        learned(llama, config(r=17), batches)


def test_vision_with_the_defaults():
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
    )
    images = [{"pixel_values": torch.randn(3, 3, 16, 16)} for _ in range(3)]
    weights = learned(vit, LoraConfig(r=4, target_modules="all-linear"), images)
    assert len(weights) > 2


def test_inputs_that_are_not_contiguous():
    lora = LoraConfig(r=2, target_modules=["first", "second"])
    assert learned(Net(), lora, rows()).keys() == {"first", "second"}


def test_a_target_that_is_never_called():
    lora = LoraConfig(r=2, target_modules=["first", "unused"])
    with pytest.raises(LayerError, match=r"'unused': its forward never ran.*target_modules"):
        learned(Net(), lora, rows(), on_missing="raise")


def test_a_convolution_is_refused_by_name():
    lora = LoraConfig(r=2, target_modules=["first", "convolution"])
    with pytest.raises(LayerError, match=r"'convolution': Conv2d layers are not supported"):
        learned(Net(), lora, rows(), on_missing="raise")


def test_a_loader_without_a_length(llama, batches):
    learned(llama, config(), iter(batches))


def test_an_empty_loader(llama):
    with pytest.raises(EmptyStreamError, match="batch"):
        learned(llama, config(), [])


def test_callers_batches_stay_whole(llama, batches):
    before = [{name: value.clone() for name, value in batch.items()} for batch in batches]
    learned(llama, config(), batches)
    for batch, copy in zip(batches, before, strict=True):
        assert batch.keys() == copy.keys()
        assert all(torch.equal(batch[name], copy[name]) for name in batch)


def test_experts_see_flat_rows():
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )
    weights = learned(mixtral, config(target_modules=["q_proj", "v_proj"]), text_batches())
    assert len(weights) == 2


class Routed(nn.Module):
    """A mixture of two experts that routes each row to one of them."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen = (flat[:, 0] > 0).long()
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(flat[chosen == number])
        return out.reshape(x.shape)


def test_experts_learn_from_the_rows_that_are_routed_to_them():
    batches = [
        {"x": torch.randn(5, 6, 8) * torch.linspace(2, 1, 8), "attention_mask": torch.ones(5, 6)}
        for _ in range(6)
    ]
    lora = LoraConfig(r=3, target_modules=["experts.0", "experts.1"])
    options = {"learner": ExactCovariance, "forward": lambda model, batch: model(batch["x"])}
    weights = learned(Routed(), lora, batches, **options)
    flat = torch.cat([batch["x"].flatten(0, 1) for batch in batches])
    for number in range(2):
        routed = flat[(flat[:, 0] > 0) == bool(number)]
        a = weights[f"experts.{number}"]
        best = torch.linalg.svd(routed).Vh[:3]
        angles = torch.linalg.svdvals(a / a[0].norm() @ best.T)
        torch.testing.assert_close(angles, torch.ones(3), atol=1e-4, rtol=0)


def test_a_tight_tolerance_ends_with_the_data(llama):
    read = []

    def loader():
        for batch in text_batches(count=15):
            read.append(batch)
            yield batch

    learned(llama, config(), loader(), stop=StoppingCriteria(tolerance=1e-12))
    assert len(read) == 15


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(side):
    whole = text_batches(count=2, size=6, length=8, padding=0)
    padded = [dict(batch) for batch in whole]
    for batch in padded:
        for name, filler in (("input_ids", 0), ("attention_mask", 0)):
            empty = torch.full((6, 5), filler)
            parts = [batch[name], empty] if side == "right" else [empty, batch[name]]
            batch[name] = torch.cat(parts, dim=1)
        # Positions as generation computes them for a left-padded batch.
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    options = {"learner": ExactCovariance}
    expected = learned(make("llama"), config(), whole, **options)
    for name, a in learned(make("llama"), config(), padded, **options).items():
        torch.testing.assert_close(a, expected[name], atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:lora with eva:UserWarning")
def test_pefts_eva_initializer_takes_these_projections(llama, batches):
    lora = config(init_lora_weights="eva", eva_config=EvaConfig())
    model = get_peft_model(llama, lora)
    projectors = fit_projectors(make("llama"), batches, 4, targets=TARGETS["llama"])
    named = {f"base_model.model.{name}": p.components for name, p in projectors.items()}
    initialize_lora_eva_weights(model, eva_state_dict=dict(named))
    for name, a in named.items():
        assert torch.equal(model.get_submodule(name).lora_A["default"].weight, a)


def test_base_outputs_after_learning_twice(llama, batches):
    expected = outputs(make("llama"), batches[0])
    model = ipa_hf.get_ipa_model(llama, config(), batches, progress=False)
    ipa_hf.initialize_lora_ipa_weights(model, batches, progress=False)
    torch.testing.assert_close(outputs(model, batches[0]), expected)
