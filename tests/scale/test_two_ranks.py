"""Two ranks under torchrun: what ranks learned before another failed, and wrapped training."""

import pytest
import torch

from tests.scale import two_ranks_run
from tests.scale.test_process_group import TORCHRUN, launch


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    launch(*TORCHRUN, 2, "-m", "tests.scale.two_ranks_run", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def both(outcomes, kind):
    first, second = (outcome[kind]["projectors"] for outcome in outcomes)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name][0], second[name][0]) and first[name][1] == second[name][1]
    return {name: rows for name, (_, rows) in first.items()}


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        # A layer that failed in rank 1 is learned from the rows of rank 0.
        ("nan0", {"0": 32, "2": 32}),
        ("nan2", {"0": 32, "2": 32}),
        ("layer", {"0": 64, "2": 32}),
        # Rank 1 ended before its third batch.
        ("loader2", {"0": 48, "2": 48}),
        ("shape2", {"0": 32, "2": 48}),
        # Rank 1 learned nothing, or nothing that merges.
        ("loader0", {"0": 32, "2": 32}),
        ("shape0", {"2": 32}),
    ],
)
def test_what_was_learned_before_is_returned_on_all_ranks(outcomes, kind, rows):
    assert both(outcomes, kind) == rows
    assert any("early" in text or "where they failed" in text
               for outcome in outcomes for text in outcome[kind]["warnings"])  # fmt: skip
    assert set(outcomes[0][kind]["missing"]) == {"0", "2"} - rows.keys()


def test_rows_of_the_healthy_rank_are_learned_as_alone(outcomes):
    from ipa_torch import fit_projectors

    alone = fit_projectors(two_ranks_run.two(), two_ranks_run.data(0), 4, progress=False)
    for name, (components, _) in outcomes[1]["nan2"]["projectors"].items():
        torch.testing.assert_close(components.abs(), alone[name].components.abs())


def test_nothing_learned_anywhere_is_an_error_on_all_ranks(outcomes):
    for outcome in outcomes:
        assert outcome["both"].startswith("LayerError") and "NaN" in outcome["both"]
        assert outcome["all"].startswith("EmptyStreamError") and "no such disk" in outcome["all"]


@pytest.mark.parametrize("order", ["DDP", "compile, DDP", "DDP, compile"])
def test_ranks_stay_equal_under_ddp(outcomes, order):
    (first, errors), (second, _) = (outcome[order] for outcome in outcomes)
    whole = outcomes[0]["one process"]
    assert first.keys() == second.keys() == whole.keys()  # no prefix of a wrapper
    for name, value in first.items():
        assert torch.equal(value, second[name])
        torch.testing.assert_close(value, whole[name])
    assert float(first["layers.2.lora_B"].abs().max()) > 1e-3
    assert len(errors) == 2 and all("first, then wrap" in error for error in errors)


def test_fsdp2_with_a_bfloat16_base(outcomes):
    (first, errors), (second, _) = (outcome["FSDP2, bfloat16"] for outcome in outcomes)
    whole = outcomes[0]["one process"]
    assert first.keys() == {"0.lora_B.default", "2.lora_B.default"}
    for name, value in first.items():
        assert torch.equal(value, second[name]) and value.dtype == torch.float32
        wanted = whole[f"layers.{name.partition('.')[0]}.lora_B"]
        assert float((value - wanted).norm() / wanted.norm()) < 0.1
    assert len(errors) == 1


def test_fsdp1_wants_a_single_dtype(outcomes):
    whole = outcomes[0]["one process"]
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 0.1)):
        for name, value in outcomes[0][f"FSDP1, {dtype}"].items():
            assert torch.equal(value, outcomes[1][f"FSDP1, {dtype}"][name])
            wanted = whole[f"layers.{name.partition('.')[0]}.lora_B"]
            assert float((value.float() - wanted).norm() / wanted.norm()) < bound
    assert "uniform dtype" in outcomes[0]["FSDP1, bfloat16, B in float32"]
