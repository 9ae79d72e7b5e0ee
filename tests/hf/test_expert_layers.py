"""Fused experts: every matrix learns from the rows that are routed to it."""

import pytest
import torch

from ipa_core import ExactCovariance
from ipa_core.errors import SettingError
from ipa_hf import expert_layers
from ipa_torch import LayerError, attach, fit_projectors, learner_bytes

from .moe_models import FAMILIES, TARGETS, batches, captured_rows, excess, experts_of, make

RANK = 4


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def learned(model, data, *, sharing="never", routing_weights=False, **options):
    options = {"learner": ExactCovariance, "progress": False, "on_missing": "ignore"} | options
    layers = expert_layers(model, TARGETS, sharing=sharing, routing_weights=routing_weights)
    with layers as names:
        return fit_projectors(model, data, RANK, targets=names, **options)


def parameter_of(name):
    return name.partition("[")[0]


def joined(rows):
    """Join the captured rows of the experts of a layer."""
    whole = {}
    for name, pair in rows.items():
        whole.setdefault(parameter_of(name), []).append(pair)
    return {
        name: tuple(torch.cat(part) for part in zip(*pairs, strict=True))
        for name, pairs in whole.items()
    }


def test_each_expert_reaches_the_optimum_of_its_rows(family):
    model = make(family)
    rows = captured_rows(model, batches())
    projectors = learned(model, batches())
    assert projectors.keys() == rows.keys()
    for name, (x, _) in rows.items():
        assert projectors[name].samples == len(x)
        assert abs(excess(projectors[name], x)) < 1e-5


def test_one_projection_for_all_experts_reaches_the_optimum_of_all_rows(family):
    model = make(family)
    rows = joined(captured_rows(model, batches()))
    projectors = learned(model, batches(), sharing="always")
    assert {parameter_of(name) for name in projectors} == rows.keys()
    for name, projector in projectors.items():
        x, _ = rows[parameter_of(name)]
        assert name.endswith("[:]")
        assert abs(excess(projector, x)) < 1e-5


def test_routing_weights_weight_the_rows(family):
    model = make(family)
    rows = captured_rows(model, batches())
    projectors = learned(model, batches(), routing_weights=True)
    for name, (x, weights) in rows.items():
        assert abs(excess(projectors[name], x, weights)) < 1e-5
    for name, projector in learned(
        model, batches(), sharing="always", routing_weights=True
    ).items():
        x, weights = joined(rows)[parameter_of(name)]
        assert abs(excess(projector, x, weights)) < 1e-5


def test_outputs_and_model_stay_as_they_were(family):
    model, batch = make(family), batches(1)[0]
    with torch.no_grad():
        expected = model(**batch).logits
        with expert_layers(model, TARGETS, sharing="unreached"):
            actual = model(**batch).logits
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    fresh = make(family)
    assert [name for name, _ in model.named_modules()] == [n for n, _ in fresh.named_modules()]
    for module in experts_of(model).values():
        assert module.config._experts_implementation == fresh.config._experts_implementation


def test_padding_does_not_count(family):
    model = make(family)
    padded = learned(model, batches())
    alone = learned(
        model,
        [
            {key: value[None, mask.bool()] for key, value in text.items()}
            for batch in batches()
            for row, mask in enumerate(batch["attention_mask"])
            for text in [{key: value[row] for key, value in batch.items()}]
        ],
    )
    assert padded.keys() == alone.keys()
    for name, projector in padded.items():
        assert projector.samples == alone[name].samples
        energies = alone[name].energies
        torch.testing.assert_close(projector.energies, energies, rtol=1e-4, atol=1e-7)


def test_passes_within_a_budget_give_the_same(family):
    model = make(family)
    whole = learned(model, batches())
    with expert_layers(model, TARGETS) as names:
        sizes = learner_bytes(model, batches()[0], RANK, targets=names, learner=ExactCovariance)
    assert sorted(name for group in sizes for name in group) == sorted(names)
    budget = sum(sizes.values()) // 3 + max(sizes.values())
    parts = learned(model, batches(), max_bytes=budget)
    assert parts.passes > 1 and list(parts) == list(whole)
    assert all(torch.equal(parts[name].components, whole[name].components) for name in whole)


def test_experts_without_tokens_are_named():
    model = make("Mixtral")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter[:2] = parameter[2:].mean(0) * 4  # the first two win, or none does
    data = [{"input_ids": torch.full((1, 4), 7), "attention_mask": torch.ones(1, 4).long()}]
    projectors = learned(model, data)
    assert projectors.missing and len(projectors) + len(projectors.missing) == 16
    shared = learned(model, data, sharing="unreached")
    assert {f"{parameter_of(name)}[:]" for name in shared.missing} <= shared.keys()


def test_only_named_parameters_are_collected():
    model = make("Qwen3Moe")
    with expert_layers(model, ["layers.1.mlp.experts.down_proj"]) as names:
        assert names == [f"model.layers.1.mlp.experts.down_proj[{e}]" for e in range(8)]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["nothing"], r"parameters named \['nothing'\], got none"),
        (["experts.gate_up_proj_bias"], "GptOssExperts, whose 'gate_up_proj_bias' multiplies"),
        (["router.weight"], "GptOssTopKRouter, which does not compute through"),
    ],
)
def test_other_parameters_are_refused(targets, message):
    with pytest.raises(LayerError, match=message), expert_layers(make("GptOss"), targets):
        pass


def test_attach_refuses_fused_experts():
    model = make("Mixtral")
    projectors = learned(model, batches(1))
    with pytest.raises(LayerError, match=r"_proj\[0\]'.*adapt fused experts with ipa_hf"):
        attach(model, projectors)


def test_opening_twice_is_refused():
    model = make("Mixtral")
    with (
        expert_layers(model, TARGETS),
        pytest.raises(SettingError, match="expected experts without layers"),
        expert_layers(model, TARGETS),
    ):
        pass
