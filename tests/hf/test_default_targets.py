"""Default targets by structure, on tiny random models of families with other names."""

import re
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig

import ipa_hf
from benchmarks import hf_families, hf_models
from benchmarks.hf_families import Found
from ipa_core.errors import SettingError

#: Families whose layers have other names than Llama's, or experts, with the least coverage.
FAMILIES = {
    "albert": 1.0,
    "bloom": 1.0,
    "deberta_v2": 1.0,
    "falcon": 1.0,
    "glm4": 1.0,
    "gpt_neox": 1.0,
    "lfm2": 0.9,
    "mamba": 0.6,
    "modernbert": 1.0,
    "mpt": 1.0,
    "phi3": 1.0,
    "wav2vec2": 0.9,
}
#: Families whose experts are fused: what is left is said.
WARNED = ["deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "olmoe", "qwen3_moe"]


@pytest.fixture(scope="module")
def kinds():
    names = [*FAMILIES, *WARNED, "laguna", "ibert", "deepseek_v4", "resnet"]
    return hf_models.families(names)


def result(kinds, family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf_families.check(family, kinds[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_of_the_blocks(kinds, family):
    found = result(kinds, family)
    assert found.works and found.ran, found
    assert found.coverage >= FAMILIES[family]
    assert not found.warned


@pytest.mark.parametrize("family", WARNED)
def test_a_small_coverage_is_said(kinds, family):
    found = result(kinds, family)
    assert found.works and found.ran, found
    assert found.warned and found.coverage < 0.5


@pytest.mark.parametrize("family", ["laguna", "deepseek_v4"])
def test_layers_that_peft_cannot_adapt_or_load_are_left_out(kinds, family):
    found = result(kinds, family)  # laguna: lost on loading; deepseek_v4: grouped linear layers
    assert found.works and found.ran, found


@pytest.mark.parametrize("family", ["ibert", "resnet"])
def test_refused_with_the_reason(kinds, family):
    found = result(kinds, family)
    assert found.verdict == "refused"
    assert "linear layers in repeated blocks" in found.refused


def tiny_llama(**settings):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "vocab_size": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size | heads | settings))


def test_the_pattern_matches_no_other_module():
    model = tiny_llama()
    pattern = ipa_hf.default_targets(model)
    matched = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    linear = {name for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)}
    assert matched == linear - {"lm_head"}


def test_a_block_whose_layer_is_of_another_kind():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    pattern = ipa_hf.default_targets(model)
    assert re.fullmatch(pattern, "model.layers.0.mlp.up_proj")
    assert not re.fullmatch(pattern, "model.layers.1.mlp.up_proj")
    assert re.fullmatch(pattern, "model.layers.1.mlp.up_proj.0")


def test_routers_and_single_gates_are_no_targets():
    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch.nn.Linear(8, 3)
            self.shared_gate = torch.nn.Linear(8, 1)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([Mixture(), Mixture()])
    pattern = ipa_hf.default_targets(model)
    matched = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    assert matched == [
        f"layers.{block}.experts.{expert}" for block in range(2) for expert in range(3)
    ]


def test_heads_and_tied_layers_are_no_targets():
    model = torch.nn.Module()
    block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 9))
    model.table = torch.nn.Embedding(9, 4)
    block[1].weight = model.table.weight
    model.blocks = torch.nn.ModuleList([block])
    model.heads = torch.nn.ModuleList([torch.nn.Linear(4, 2)])
    model.head = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    names = [name for name, _ in model.named_modules()]
    assert [x for x in names if re.fullmatch(ipa_hf.default_targets(model), x)] == ["blocks.0.0"]


def test_coverage_of_other_targets():
    model = tiny_llama()
    assert ipa_hf.target_coverage(model, ipa_hf.default_targets(model)) == 1
    # Query and value of a block: 2 * 16 * 16 of 4 * 16 * 16 + 3 * 16 * 32 weights.
    assert ipa_hf.target_coverage(model, r".*\.(q|v)_proj") == pytest.approx(0.2)
    assert ipa_hf.target_coverage(torch.nn.Linear(2, 2), ".*") == 0


def test_the_warning_names_what_is_left_out_and_the_cure():
    kind = transformers.MixtralForCausalLM
    model = hf_models.build(kind, next(iter(hf_models._configs("mixtral", kind))))
    batches = [{"input_ids": torch.randint(60, (2, 8))}]
    cure = (
        r"experts\.gate_up_proj.*target_parameters=\['experts.down_proj', 'experts.gate_up_proj'\]"
    )
    with pytest.warns(UserWarning, match=rf"cover \d+% of the weights.*{cure}"):
        ipa_hf.get_ipa_model(model, LoraConfig(r=2), batches, progress=False)


def test_peft_refusals_are_errors_of_this_package():
    with pytest.raises(
        SettingError, match="that PEFT takes, got NoMatchingPeftModuleError: Target modules"
    ):
        ipa_hf.get_ipa_model(tiny_llama(), LoraConfig(target_modules=["no_such_layer"]), [])


def test_every_family_of_transformers_has_a_verdict():
    table = (hf_families.record.FOLDER / "hf_families.md").read_text()
    assert f"transformers {transformers.__version__}:" in table
    assert "0 fail." in table and "FAILS" not in table


def test_verdicts():
    assert Found("m", layers=1, coverage=1.0, ran=True, effect=1.0).verdict == "works"
    assert Found("m", layers=1, coverage=0.3, ran=True, effect=1.0).verdict == "FAILS"
    assert Found("m", layers=1, coverage=0.3, warned=True, ran=True, effect=1.0).works
    assert Found("m", layers=1, coverage=1.0, ran=True, effect=1.0, stock=0.1).verdict == "FAILS"
    assert Found("m", refused="no blocks").verdict == "refused"
    assert Found("m", refused="no blocks", error="KeyError").verdict == "FAILS"
