"""LoRA adapters of fused experts begin with the experts' projections, in PEFT's layout."""

import json
import warnings

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file

import ipa_hf
import ipa_hf.renamed_keys
from benchmarks import record
from ipa_core import ExactCovariance
from ipa_core.errors import RankError, SettingError
from ipa_hf.adapter_metadata import find_metadata
from ipa_hf.expert_lora import expert_A_and_B
from ipa_hf.lora_layers import lora_layers
from ipa_torch import LayerError, fit_projectors

from .models import outputs, train
from .moe_models import FAMILIES, TARGETS, batches, captured_rows, excess, make

# PEFT looks for the keys of its patterns among modules alone; it applies them to parameters.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def parameters(model):
    """Return the targets that a model has."""
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    return [t for t in TARGETS if any(name.endswith(f".{t}") for name in names)]


def config(model, **settings):
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": parameters(model),
    }
    return LoraConfig(**(defaults | settings))


def adapted(family, data=None, *, settings=None, **options):
    model = make(family)
    options = {"learner": ExactCovariance} | options if data is None else options
    return ipa_hf.get_ipa_model(
        model,
        config(model, **(settings or {})),
        batches() if data is None else data,
        **options,
        **({"progress": False} if data is None else {}),
    )


def wrappers(model, adapter_name="default"):
    layers = lora_layers(model, adapter_name)
    return {name: layer for name, layer in layers.items() if isinstance(layer, ParamWrapper)}


def randomize(model, adapter_name="default"):
    """Give B values as of training, large enough to be seen."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(model, adapter_name).values():
            b = layer.lora_B[adapter_name].weight
            b.copy_(0.5 * torch.randn(b.shape, generator=generator))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_each_experts_A_is_its_scaled_projection(family):
    model = adapted(family)
    rows = captured_rows(make(family), batches())
    metadata = find_metadata(model)
    assert wrappers(model)
    for name, layer in wrappers(model).items():
        a, b = expert_A_and_B(layer, "default")
        assert not b.any()
        for expert, matrix in enumerate(a):
            of_expert = metadata.layers[f"{name}[{expert}]"]
            x, _ = rows[f"{name}[{expert}]"]
            p = matrix.detach().double() / of_expert.scale
            torch.testing.assert_close(p @ p.T, torch.eye(4).double(), atol=1e-5, rtol=0)
            projector = type("Span", (), {"components": p})
            assert abs(excess(projector, x)) < 1e-5
            assert of_expert.samples == len(x)


def test_begins_as_the_base_model(family):
    model, batch = adapted(family), batches(1)[0]
    close(outputs(model, batch), outputs(make(family), batch))
    assert ".base_layer" not in str(list(find_metadata(model).layers))


def test_adapter_computes_what_its_matrices_say(family):
    model, batch = adapted(family), batches(1)[0]
    randomize(model)
    plain = make(family)
    with torch.no_grad():
        for name, layer in lora_layers(model, "default").items():
            scaling = layer.scaling["default"]
            if isinstance(layer, ParamWrapper):
                a, b = expert_A_and_B(layer, "default")
                delta = torch.stack([lift @ p for p, lift in zip(a, b, strict=True)])
                base = plain.get_parameter(name)
                transposed = layer.get_base_layer().is_transposed
                base += scaling * (delta.mT if transposed else delta)
            else:
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                plain.get_submodule(name).weight += scaling * b @ a
    assert not torch.allclose(outputs(plain, batch), outputs(make(family), batch), atol=1e-3)
    close(outputs(model, batch), outputs(plain, batch))


def test_stock_peft_loads_and_merges_it(family, tmp_path):
    model, batch = adapted(family), batches(1)[0]
    randomize(model)
    expected = outputs(model, batch)
    assert (expected - outputs(make(family), batch)).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(family), tmp_path)
    close(outputs(again, batch), expected)
    close(outputs(again.merge_and_unload(), batch), expected)


def test_a_step_of_training_changes_B_alone(family):
    model = adapted(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, batches(), steps=1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_B" in name}


def test_A_stays_frozen_through_loading_and_switching(tmp_path):
    model = adapted("Qwen3Moe")
    model.save_pretrained(tmp_path)
    again = ipa_hf.load_adapter(make("Qwen3Moe"), tmp_path, is_trainable=True)
    again.add_adapter("second", config(make("Qwen3Moe")))
    for name in ("second", "default"):
        again.set_adapter(name)
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trainable and all("lora_B.default" in name for name in trainable)


def test_trainable_A_is_trained():
    model = adapted("Mixtral", trainable=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, batches(), steps=2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_ranks_differ_by_parameter():
    model = adapted("Mixtral", settings={"rank_pattern": {"gate_up_proj": 2}})
    ranks = {name: layer.r["default"] for name, layer in wrappers(model).items()}
    assert {ranks[name] for name in ranks if name.endswith("gate_up_proj")} == {2}
    assert {ranks[name] for name in ranks if name.endswith("down_proj")} == {4}


def test_second_adapter_of_the_same_parameters():
    model, batch = adapted("Mixtral"), batches(1)[0]
    model.add_adapter("second", config(make("Mixtral"), r=2))
    ipa_hf.initialize_lora_ipa_weights(model, batches(), adapter_name="second", progress=False)
    model.set_adapter("second")
    close(outputs(model, batch), outputs(make("Mixtral"), batch))
    for layer in wrappers(model, "second").values():
        first, _ = expert_A_and_B(layer, "default")
        second, _ = expert_A_and_B(layer, "second")
        spans = [torch.linalg.qr(x.mT.double()).Q for x in (first, second)]
        inside = torch.linalg.svdvals(spans[0].mT @ spans[1])
        torch.testing.assert_close(inside, torch.ones_like(inside), atol=2e-2, rtol=0)


def test_all_experts_share_one_projection():
    model = adapted("Qwen3Moe", expert_sharing="always")
    for layer in wrappers(model).values():
        a, _ = expert_A_and_B(layer, "default")
        assert torch.equal(a, a[:1].expand_as(a))


ONE_TOKEN = [{"input_ids": torch.full((1, 6), 7), "attention_mask": torch.ones(1, 6).long()}]


def test_experts_without_tokens_keep_a_random_A_and_are_named():
    with pytest.warns(UserWarning, match=r"experts.gate_up_proj\[.*\]': no token was routed"):
        model = adapted("Qwen3Moe", ONE_TOKEN, progress=False)
    close(outputs(model, batches(1)[0]), outputs(make("Qwen3Moe"), batches(1)[0]))
    with pytest.raises(LayerError, match=r"experts.down_proj\[.*\]': no token was routed to it"):
        adapted("Qwen3Moe", ONE_TOKEN, on_missing="raise", progress=False)


def test_experts_without_tokens_take_the_layers_projection_if_asked():
    with pytest.warns(UserWarning, match=r"projector shared by their layer, as no token"):
        model = adapted("Qwen3Moe", ONE_TOKEN, expert_sharing="unreached", progress=False)
    metadata = find_metadata(model)
    for name in wrappers(model):
        assert all(f"{name}[{expert}]" in metadata.layers for expert in range(8))


def test_fitted_projectors_are_placed():
    model = make("Mixtral")
    with ipa_hf.expert_layers(model, TARGETS[::2], sharing="always") as names:
        shared = fit_projectors(model, batches(), 6, targets=names, progress=False)
    settings = {"target_modules": []}
    placed = adapted("Mixtral", shared, settings=settings)
    for name, layer in wrappers(placed).items():
        a, _ = expert_A_and_B(layer, "default")
        projector = shared[f"{name}[:]"].truncate(4)
        scale = find_metadata(placed).layers[f"{name}[0]"].scale
        torch.testing.assert_close(a[0], scale * projector.components)
    with pytest.raises(SettingError, match="no options of a fit"):
        adapted("Mixtral", shared, expert_sharing="always")
    with pytest.raises(RankError, match=r"_proj\[0\]': expected a projector of rank 8"):
        adapted("Mixtral", shared, settings=settings | {"r": 8})


def test_ranks_of_shared_projectors_are_allocated():
    model = make("Mixtral")
    with ipa_hf.expert_layers(model, TARGETS[::2], sharing="always") as names:
        shared = fit_projectors(model, batches(), 6, targets=names, progress=False)
    allocated = shared.allocate(12, floor=2)
    settings = config(model, target_modules=[])
    placed = ipa_hf.get_ipa_model(model, ipa_hf.match_ranks(settings, allocated), allocated)
    ranks = {name: layer.r["default"] for name, layer in wrappers(placed).items()}
    assert ranks == {name.partition("[")[0]: p.rank for name, p in allocated.items()}
    assert {layer.scaling["default"] for layer in wrappers(placed).values()} == {2.0}


def test_ranks_that_differ_between_experts_are_refused():
    model = make("Mixtral")
    with ipa_hf.expert_layers(model, ["experts.down_proj"]) as names:
        fitted = fit_projectors(model, batches(), 4, targets=names, progress=False)
    uneven = fitted.truncate({name: 2 + (name.endswith("[0]")) for name in fitted})
    with pytest.raises(RankError, match=r"down_proj': expected one rank for all experts"):
        ipa_hf.match_ranks(config(model), uneven)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_export_has_a_matrix_for_each_expert(family, tmp_path):
    model = adapted(family, settings={"use_rslora": True, "rank_pattern": {"down_proj": 2}})
    randomize(model)
    ipa_hf.export_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gate, up = ("w1", "w3") if family == "Mixtral" else ("gate_proj", "up_proj")
    keys = [name for name in tensors if f"experts.0.{gate}.lora_A" in name]
    assert len(keys) == 2
    for key in keys:
        assert torch.equal(tensors[key], tensors[key.replace(gate, up)])
        assert tensors[key].shape == (4, 32)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {gate, up} < {*settings["target_modules"]} and not settings["target_parameters"]
    batch = batches(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(make(family), tmp_path)
    close(outputs(again, batch), outputs(model, batch))


def test_export_of_fused_checkpoints_is_in_the_layout_of_peft(tmp_path):
    model = adapted("GptOss", settings={"rank_pattern": {"down_proj": 2}})
    randomize(model)
    ipa_hf.export_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.mlp.experts"
    assert tensors[f"{prefix}.base_layer.lora_A.weight"].shape == (4 * 4, 32)  # gate and up
    assert tensors[f"{prefix}.lora_B.weight"].shape == (32, 4 * 4)  # down
    batch = batches(1)[0]
    close(
        outputs(PeftModel.from_pretrained(make("GptOss"), tmp_path), batch), outputs(model, batch)
    )


def test_export_writes_the_other_parameter_as_zeros(tmp_path):
    model = adapted("DeepseekV3", settings={"target_parameters": ["experts.down_proj"]})
    randomize(model)
    ipa_hf.export_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    named = {name.split(".")[-3]: tensor for name, tensor in tensors.items() if "experts.0" in name}
    assert named["down_proj"].any() and not named["gate_proj"].any()


def test_export_refuses_checkpoints_of_another_form(tmp_path):
    model = adapted("GraniteMoe")
    with pytest.raises(SettingError, match="input_linear.*merge_and_unload"):
        ipa_hf.export_lora(model, tmp_path)


def test_parameters_of_linear_layers_and_routers_are_refused_by_name():
    model = make("Qwen3Moe")
    for target, message in (
        ("q_proj.weight", "Linear, which target_modules can name"),
        ("mlp.gate.weight", "Qwen3MoeTopKRouter, which does not compute through"),
    ):
        lora = LoraConfig(r=2, target_modules=[], target_parameters=[target])
        with pytest.raises(LayerError, match=message):
            ipa_hf.get_ipa_model(model, lora, batches(), on_missing="raise", progress=False)


def test_experts_outside_of_transformers_interface_are_refused_by_name():
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    settings = transformers.Llama4TextConfig(**size, **heads, vocab_size=64, pad_token_id=0)
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    with pytest.raises(LayerError, match="'layers.0.feed_forward.experts.down_proj': .*Llama4Text"):
        ipa_hf.get_ipa_model(
            transformers.Llama4TextModel(settings),
            lora,
            batches(),
            on_missing="raise",
            progress=False,
        )


def test_offloaded_experts_are_refused_by_name():
    model = accelerate.cpu_offload(make("Mixtral"))
    with pytest.raises(LayerError, match="MixtralExperts, whose weights are offloaded"):
        ipa_hf.get_ipa_model(model, config(model), batches(), on_missing="raise", progress=False)


def test_experts_whose_lora_peft_loses_are_refused_by_name(monkeypatch):
    def rename(model, lora, tensors, adapter_name):
        return {key.replace(".mlp.experts.", ".mlp.mlp.experts."): x for key, x in tensors.items()}

    monkeypatch.setattr(
        ipa_hf.renamed_keys, "convert_peft_adapter_state_dict_for_transformers", rename
    )
    with pytest.raises(LayerError, match="experts.down_proj': PEFT renames its saved LoRA"):
        adapted("Mixtral", batches(), on_missing="raise", progress=False)
    with pytest.warns(UserWarning, match="experts.gate_up_proj': PEFT renames its saved LoRA"):
        model = adapted("Mixtral", batches(), progress=False)
    layers = find_metadata(model).layers
    assert layers and all("experts" not in name for name in layers)


def test_the_table_of_families_is_of_this_version():
    table = (record.FOLDER / "hf_moe_families.md").read_text()
    assert table.startswith(f"transformers {transformers.__version__}: ")
    assert ", 0 fail." in table.partition("\n")[0]
