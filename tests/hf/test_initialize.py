import math
from functools import partial

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig
from peft.tuners.lora.layer import LoraLayer

import ipa_hf
from ipa_core import ExactCovariance, RankError, SettingError, ShapeError
from ipa_hf.adapter_metadata import find_metadata
from ipa_torch import LayerError, fit_projectors

from .models import (
    TARGETS,
    base_state,
    config,
    make,
    outputs,
    same_state,
    text_batches,
    train,
)


def built(family, batches, *, lora=None, **options):
    lora = lora or config(family, fan_in_fan_out=family == "gpt2")
    return ipa_hf.get_ipa_model(make(family), lora, batches, progress=False, **options)


def layers_of(model, adapter="default"):
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if adapter in getattr(module, "lora_A", {})
    }


class TestWeights:
    def test_a_is_a_multiple_of_p_and_b_is_zero(self, family, batches):
        model = built(family, batches, learner=ExactCovariance)
        learned = fit_projectors(
            make(family), batches, 4, targets=TARGETS[family], learner=ExactCovariance
        )
        layers = layers_of(model)
        assert layers.keys() == learned.keys()
        for name, layer in layers.items():
            a = layer.lora_A["default"].weight
            gram = a @ a.T
            torch.testing.assert_close(gram, gram[0, 0] * torch.eye(4), atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(a / a[0].norm(), learned[name].components.float())
            assert not layer.lora_B["default"].weight.any()

    def test_outputs_are_those_of_the_base_model(self, family, batches):
        expected = outputs(make(family), batches[0])
        torch.testing.assert_close(outputs(built(family, batches), batches[0]), expected)

    def test_base_weights_are_untouched_bit_by_bit(self, family, batches):
        model = built(family, batches)
        train(model, batches)
        assert same_state(base_state(model), base_state(make(family)))

    def test_the_callers_configuration_is_untouched(self, batches):
        lora = config(rank_pattern={"q_proj": 2})
        before = lora.to_dict()
        built("llama", batches, lora=lora)
        assert lora.to_dict() == before
        assert type(lora) is LoraConfig

    def test_training_flags_and_random_state_are_kept(self, llama, batches):
        llama.train()
        state = torch.get_rng_state()
        model = get_peft_model(llama, config())
        after = torch.get_rng_state()
        ipa_hf.initialize_lora_ipa_weights(model, batches, progress=False)
        assert torch.equal(torch.get_rng_state(), after)
        assert not torch.equal(state, after)
        assert all(module.training for module in model.modules())

    def test_half_precision_base(self, batches):
        model = ipa_hf.get_ipa_model(
            make("llama").to(torch.bfloat16), config(), batches, progress=False
        )
        assert all(
            x.lora_A["default"].weight.dtype == torch.float32 for x in layers_of(model).values()
        )
        assert outputs(model, batches[0]).isfinite().all()


class TestScaling:
    def test_energy_is_that_of_loras_random_a(self, llama, batches):
        inputs = []
        hook = llama.model.layers[1].mlp.down_proj.register_forward_pre_hook(
            lambda _, args: inputs.append(args[0][batches[0]["attention_mask"] != 0])
        )
        outputs(llama, batches[0])
        hook.remove()
        lora = config(target_modules=["1.mlp.down_proj"])
        model = built("llama", batches[:1], lora=lora, learner=ExactCovariance)
        (layer,) = layers_of(model).values()
        energy = (inputs[0] @ layer.lora_A["default"].weight.T).square().sum(-1).mean()
        expected = inputs[0].square().sum(-1).mean() * layer.r["default"] / (3 * 32)
        torch.testing.assert_close(energy, expected)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"lora_alpha": 3},
            {"use_rslora": True},
            {"rank_pattern": {"q_proj": 2}},
            {"alpha_pattern": {"q_proj": 5}},
        ],
    )
    def test_a_number_is_lambda_exactly(self, batches, settings):
        model = built("llama", batches, lora=config(**settings), scaling=0.25)
        for layer in layers_of(model).values():
            rows = layer.scaling["default"] * layer.lora_A["default"].weight
            assert torch.allclose(rows.norm(dim=1), torch.tensor(0.25))

    def test_rslora_keeps_pefts_scaling(self, batches):
        model = built("llama", batches, lora=config(use_rslora=True))
        assert all(x.scaling["default"] == 8 / math.sqrt(4) for x in layers_of(model).values())

    def test_centered_learning_counts_the_means_share(self, batches):
        model = built("llama", batches, learner=partial(ExactCovariance, center=True))
        assert all(x.lora_A["default"].weight.isfinite().all() for x in layers_of(model).values())

    @pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan"), "lora", True])
    def test_refused(self, batches, scaling):
        with pytest.raises(SettingError, match="scaling"):
            built("llama", batches, scaling=scaling)


class TestTargets:
    @pytest.mark.parametrize(
        "targets",
        [["q_proj"], "all-linear", r".*\.1\.self_attn\.(q|v)_proj", ["model.layers.0.mlp.up_proj"]],
    )
    def test_every_form_that_peft_takes(self, llama, batches, targets):
        lora = config(target_modules=targets)
        plain = get_peft_model(make("llama"), config(target_modules=targets))
        model = ipa_hf.get_ipa_model(llama, lora, batches, progress=False)
        assert layers_of(model).keys() == layers_of(plain).keys()

    def test_layers_to_transform_and_exclude(self, batches):
        lora = config(layers_to_transform=[1], exclude_modules=["v_proj"])
        names = layers_of(built("llama", batches, lora=lora))
        assert names and all(".1." in name and "v_proj" not in name for name in names)

    def test_rank_pattern(self, batches):
        model = built("llama", batches, lora=config(rank_pattern={"q_proj": 2, "up_proj": 6}))
        ranks = {name.rpartition(".")[2]: x.r["default"] for name, x in layers_of(model).items()}
        assert ranks == {"q_proj": 2, "k_proj": 4, "v_proj": 4, "up_proj": 6, "down_proj": 4}

    def test_shared_inputs_give_equal_a(self, batches):
        attention = layers_of(built("llama", batches))
        q, k = (attention[f"model.layers.0.self_attn.{x}_proj"].lora_A["default"] for x in "qk")
        assert torch.equal(q.weight, k.weight)

    def test_modules_to_save(self, batches):
        model = built("llama", batches, lora=config(modules_to_save=["lm_head"]))
        assert model.get_base_model().lm_head.weight.requires_grad

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_bias(self, batches, bias):
        model = built("bert", batches, lora=config("bert", bias=bias))
        assert any(n.endswith(".bias") and p.requires_grad for n, p in model.named_parameters())


class TestFittedProjectors:
    def test_learned_on_the_plain_model(self, llama, batches):
        projectors = fit_projectors(llama, batches, 6, targets=TARGETS["llama"])
        model = ipa_hf.get_ipa_model(llama, config(), projectors, scaling=1.0)
        for name, layer in layers_of(model).items():
            rows = 2.0 * layer.lora_A["default"].weight
            torch.testing.assert_close(rows, projectors[name].components[:4].float())

    def test_too_small(self, llama, batches):
        projectors = fit_projectors(llama, batches, 2, targets=TARGETS["llama"])
        with pytest.raises(RankError, match=r"layer 'model.layers.0.self_attn.q_proj'.*rank 4"):
            ipa_hf.get_ipa_model(llama, config(), projectors)

    def test_of_another_layer(self, llama, batches):
        projectors = dict(fit_projectors(llama, batches, 4, targets=TARGETS["llama"]))
        name = "model.layers.0.mlp.down_proj"
        projectors[name] = projectors["model.layers.0.mlp.up_proj"]
        with pytest.raises(ShapeError, match=f"layer '{name}'.*32 features"):
            ipa_hf.get_ipa_model(llama, config(), projectors)

    def test_options_with_projectors(self, llama):
        with pytest.raises(SettingError, match="learner"):
            ipa_hf.get_ipa_model(llama, config(), {}, learner=ExactCovariance)


class TestMissing:
    def test_named_with_the_cure(self, llama, batches):
        projectors = fit_projectors(llama, batches, 4, targets=["q_proj"])
        with pytest.raises(LayerError, match=r"k_proj'.*on_missing='warn'"):
            ipa_hf.get_ipa_model(llama, config(), projectors, on_missing="raise")

    def test_warned_about_by_name(self, llama, batches):
        projectors = fit_projectors(llama, batches, 4, targets=["q_proj"])
        with pytest.warns(
            UserWarning, match="8 layers keep LoRA's random A.*'.*0.self_attn.k_proj'"
        ):
            model = ipa_hf.get_ipa_model(llama, config(), projectors)
        for name, layer in layers_of(model).items():
            assert layer.lora_A["default"].weight.requires_grad == ("q_proj" not in name)

    def test_ignored_silently_on_request(self, llama, batches):
        projectors = fit_projectors(llama, batches, 4, targets=["q_proj"])
        ipa_hf.get_ipa_model(llama, config(), projectors, on_missing="ignore")

    @pytest.mark.parametrize("on_missing", ["warn", "ignore"])
    def test_no_layer_at_all_is_an_error(self, llama, on_missing):
        with pytest.raises(LayerError, match="got none for 10"):
            ipa_hf.get_ipa_model(llama, config(), {}, on_missing=on_missing)

    def test_other_settings_are_refused(self, llama):
        with pytest.raises(SettingError, match="on_missing"):
            ipa_hf.get_ipa_model(llama, config(), {}, on_missing="error")

    @pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]])
    @pytest.mark.parametrize(
        "options", [{"progress": False}, {"expert_sharing": "always"}, {"routing_weights": True}]
    )
    def test_options_beside_fitted_projectors_are_refused(self, llama, targets, options):
        with pytest.raises(SettingError, match="no options of a fit with fitted projectors"):
            ipa_hf.get_ipa_model(llama, config(target_modules=targets), {}, **options)
        assert not any(isinstance(module, LoraLayer) for module in llama.modules())

    def test_embeddings_are_no_linear_layers(self, batches):
        lora = config(target_modules=["q_proj", "embed_tokens"])
        with pytest.raises(LayerError, match=r"'model.embed_tokens': Embedding layers are"):
            built("llama", batches, lora=lora, on_missing="raise")
        with pytest.warns(UserWarning, match="embed_tokens"):
            built("llama", batches, lora=lora)

    def test_embeddings_alone(self, batches):
        lora = config(target_modules=["embed_tokens"])
        with pytest.raises(LayerError, match=r"'model.embed_tokens': Embedding layers are"):
            built("llama", batches, lora=lora, on_missing="raise")
        with pytest.warns(UserWarning, match="embed_tokens.*Embedding layers are not supported"):
            model = built("llama", batches, lora=lora)
        assert find_metadata(model) is None
        built("llama", batches, lora=lora, on_missing="ignore")

    @pytest.mark.parametrize("loader", [[], iter([]), torch.utils.data.DataLoader([])])
    def test_an_empty_loader_is_named(self, loader):
        with pytest.raises(ValueError, match="at least one batch.*the loader is neither empty"):
            built("llama", loader)

    def test_refused_before_the_fit(self, llama):
        def loader():
            raise AssertionError("read")
            yield

        lora = config(target_modules=["q_proj", "embed_tokens"])
        with pytest.raises(LayerError, match="embed_tokens"):
            ipa_hf.get_ipa_model(llama, lora, loader(), on_missing="raise")

    def test_a_failure_restores_the_model(self, llama, batches):
        flags = {name: p.requires_grad for name, p in llama.named_parameters()}
        with pytest.raises(LayerError):
            ipa_hf.get_ipa_model(llama, config(), {}, on_missing="raise")
        assert {name: p.requires_grad for name, p in llama.named_parameters()} == flags
        assert not any(isinstance(module, LoraLayer) for module in llama.modules())


class TestFreshAdaptersOnly:
    @pytest.mark.parametrize("init", [False, "pissa", "olora"])
    def test_methods_that_change_base_weights(self, llama, batches, init):
        with pytest.raises(SettingError, match="init_lora_weights"):
            ipa_hf.get_ipa_model(llama, config(init_lora_weights=init), batches)

    @pytest.mark.parametrize(
        ("field", "variant"),
        [
            pytest.param(
                "kasa_config",
                lambda: peft.KasaConfig(),
                marks=pytest.mark.skipif(
                    not hasattr(peft, "KasaConfig"), reason="this version of PEFT has no KaSA"
                ),
            ),
            ("init_lora_weights", lambda: "pissa"),
            ("use_bdlora", lambda: BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2)),
            ("use_qalora", lambda: True),
        ],
    )
    def test_variants_are_refused_before_they_change_weights(self, llama, batches, field, variant):
        before = {name: value.clone() for name, value in llama.state_dict().items()}
        with pytest.raises(SettingError, match=field):
            ipa_hf.get_ipa_model(llama, config(**{field: variant()}), batches)
        assert llama.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())

    def test_a_compiled_model(self, batches):
        model = ipa_hf.get_ipa_model(
            torch.compile(make("llama"), backend="eager"), config(), batches, progress=False
        )
        metadata = find_metadata(model)
        assert "model.layers.0.self_attn.q_proj" in metadata.layers

    def test_trained(self, llama, batches):
        model = get_peft_model(llama, config())
        train(model, batches)
        with pytest.raises(SettingError, match="trained"):
            ipa_hf.initialize_lora_ipa_weights(model, batches)

    def test_merged(self, llama, batches):
        model = get_peft_model(llama, config())
        model.merge_adapter()
        with pytest.raises(SettingError, match="unmerge_adapter"):
            ipa_hf.initialize_lora_ipa_weights(model, batches)

    def test_unknown_adapter(self, llama, batches):
        with pytest.raises(SettingError, match="'other'"):
            ipa_hf.initialize_lora_ipa_weights(
                get_peft_model(llama, config()), batches, adapter_name="other"
            )

    def test_second_adapter_learns_from_the_base_model(self, llama, batches):
        model = built("llama", batches, learner=ExactCovariance)
        train(model, batches, rate=0.1)
        first = {n: p.clone() for n, p in model.named_parameters() if "default" in n}
        model.add_adapter("second", config())
        ipa_hf.initialize_lora_ipa_weights(
            model, batches, adapter_name="second", progress=False, learner=ExactCovariance
        )
        for layer in layers_of(model).values():
            torch.testing.assert_close(
                layer.lora_A["second"].weight, layer.lora_A["default"].weight
            )
        assert all(torch.equal(p, first[n]) for n, p in model.named_parameters() if n in first)

    def test_inference_mode_stays(self, llama, batches, tmp_path):
        get_peft_model(llama, config()).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make("llama"), tmp_path)
        ipa_hf.initialize_lora_ipa_weights(model, batches, trainable=True, progress=False)
        assert not any(p.requires_grad for p in model.parameters())


def test_dora_trains_its_magnitude(batches):
    model = built("llama", batches, lora=config(use_dora=True))
    expected = outputs(make("llama"), batches[0])
    torch.testing.assert_close(outputs(model, batches[0]), expected)
    layer = next(iter(layers_of(model).values()))
    before = layer.lora_magnitude_vector["default"].weight.clone()
    a = layer.lora_A["default"].weight.clone()
    train(model, text_batches())
    assert not torch.equal(layer.lora_magnitude_vector["default"].weight, before)
    assert torch.equal(layer.lora_A["default"].weight, a)


def test_several_passes_under_a_memory_limit(batches):
    runs = []

    def forward(model, batch):
        runs.append(1)
        model(**batch)

    expected = layers_of(built("llama", batches))
    limited = layers_of(built("llama", batches, max_bytes=100_000, forward=forward))
    assert len(runs) > 2 * len(batches)
    for name, layer in expected.items():
        assert torch.equal(limited[name].lora_A["default"].weight, layer.lora_A["default"].weight)
    with pytest.raises(SettingError, match=r"layer 'model.layers.0.self_attn.q_proj'.*max_bytes"):
        built("llama", batches, max_bytes=1000)
