"""Fits in a process group under torchrun and accelerate: all ranks have the same projectors."""

import sys

import pytest
import torch

from ipa_core import Projector, RandomizedSVD
from ipa_torch import LayerProjectors, fit_projectors
from tests import child_process
from tests.scale import process_group_run, runs

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]


def launch(*command):
    command = [sys.executable, "-m", *map(str, command)]
    done = child_process.run(command, cwd=runs.ROOT, env=runs.environment())
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request, tmp_path_factory):
    """The outcomes of 2 and of 4 processes under torchrun."""
    folder = tmp_path_factory.mktemp("process_group")
    launch(*TORCHRUN, request.param, "-m", "tests.scale.process_group_run", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def projector(entry):
    components, energies, total, samples = entry
    return Projector(components, torch.zeros(components.shape[1]), energies, total, samples)


def excess(projector, rows):
    """Return the excess of the reconstruction error of the rows."""
    rows = rows.double()
    p = projector.components.double()
    left = rows.square().sum() - (rows @ p.T).square().sum()
    best = torch.linalg.svdvals(rows)[len(p) :].square().sum()
    return float(left / best - 1)


def captured(batches):
    """Return the input rows of the linear layers."""
    model, seen = runs.model(), {}
    for name in ("query", "value", "out"):
        getattr(model, name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach())
        )
    for batch in batches:
        model(batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def equal(outcomes, key):
    """Return the outcome, which is the same on all ranks, to the bit."""
    first, *others = (outcome[key] for outcome in outcomes)
    for other in others:
        assert other["learned"].keys() == first["learned"].keys()
        for name, entry in first["learned"].items():
            assert torch.equal(other["learned"][name][0], entry[0]), name
            assert torch.equal(other["learned"][name][1], entry[1]), name
            assert other["learned"][name][2:] == entry[2:], name
        assert {k: v for k, v in other.items() if k != "learned"} == {
            k: v for k, v in first.items() if k != "learned"
        }
    return first


def test_unequal_and_empty_shares_give_the_result_of_a_single_process(outcomes):
    merged = equal(outcomes, "exact")
    whole = process_group_run.learn(runs.batches(process_group_run.BATCHES))
    assert [list(names) for names in merged["shared"]] == [list(n) for n in whole.shared]
    for name, entry in merged["learned"].items():
        assert entry[3] == whole[name].samples
    for name, rows in captured(runs.batches(process_group_run.BATCHES)).items():
        assert excess(projector(merged["learned"][name]), rows) < 1e-5
    assert set(merged["stopped"].values()) == {"the batches ended"}


def test_default_learner_keeps_its_bound(outcomes):
    merged = equal(outcomes, "default")
    for name, rows in captured(runs.batches(process_group_run.BATCHES)).items():
        assert excess(projector(merged["learned"][name]), rows) < RandomizedSVD.guarantee.excess


def test_layers_that_branch_on_one_rank_branch_on_all(outcomes):
    merged = equal(outcomes, "branched")
    assert merged["shared"] == [("query",), ("value",)]
    assert merged["missing"] == {"never": "its forward never ran"}
    assert merged["learned"]["query"][3] == 50 * len(outcomes)


def test_failure_of_a_rank_is_raised_on_the_others(outcomes):
    *others, last = (outcome["failed"] for outcome in outcomes)
    assert last == "ValueError: no such token"
    peer_error = f"PeerError: process {len(others)} failed with ValueError: no such token"
    assert others == [peer_error] * len(others)


def test_failed_merge_is_an_error_on_all_ranks(outcomes):
    messages = {outcome["unequal"] for outcome in outcomes}
    assert len(messages) == 1 and "PeerError: layer '0'" in (message := messages.pop())
    assert "features" in message
    assert all("expected the same targets" in outcome["targets"] for outcome in outcomes)
    assert all(outcome["empty"].startswith("EmptyStreamError") for outcome in outcomes)


def test_each_process_resumes_from_its_own_checkpoint(outcomes):
    size = len(outcomes)
    assert all(outcome["resumed"][0].split(":")[0] == "PeerError" for outcome in outcomes[:-1])
    whole = equal(outcomes, "exact")
    for rank, outcome in enumerate(outcomes):
        _, again, passed = outcome["resumed"]
        for name, entry in again["learned"].items():
            # The convolution draws other patches after a failure in its own process only.
            assert torch.equal(entry[0], whole["learned"][name][0]), name
        assert passed == (len(process_group_run.share(rank, size)) - 1 if rank == size - 1 else 0)


def test_online_modes_have_the_same_p_on_all_ranks(outcomes):
    first, *others = (outcome["online"] for outcome in outcomes)
    for other in others:
        assert all(torch.equal(p, q) for p, q in zip(first, other, strict=True))
    rows = [process_group_run.rows(10 * s + r) for s in range(3) for r in range(len(outcomes))]
    everything = projector((first[-1], torch.zeros(len(first[-1])), 0.0, 0))
    assert excess(everything, torch.cat(rows)) < 1e-4


def test_sharded_model_ends_with_the_first_rank_that_ends(outcomes):
    merged = equal(outcomes, "sharded")
    assert merged["learned"]["0"][3] == 2 * 50 * len(outcomes)
    rows = [
        process_group_run.rows(10 * rank + n) for rank in range(len(outcomes)) for n in range(2)
    ]
    assert excess(projector(merged["learned"]["0"]), torch.cat(rows)) < 1e-4


def test_sharded_model_resumes_at_the_latest_checkpoint_of_all(outcomes):
    firsts, there, passed, again, whole, damaged = zip(
        *(outcome["sharded again"] for outcome in outcomes), strict=True
    )
    *others, last = firsts
    assert last == "ValueError: killed"
    assert all(other.startswith("PeerError: process") for other in others)
    assert {*map(tuple, there)} == {("step-0000000002", "step-0000000003")}
    assert {*passed} == {3}
    merged = equal([{"again": entry} for entry in again], "again")
    expected = equal([{"whole": entry} for entry in whole], "whole")
    for name, entry in merged["learned"].items():
        assert torch.equal(entry[0], expected["learned"][name][0])
    assert damaged[0].startswith("FileFormatError: expected a complete checkpoint")
    assert all(f"process 0 failed with {damaged[0]}" in other for other in damaged[1:])


def test_wrapped_model_with_buffers_and_unequal_batches(outcomes):
    merged = equal(outcomes, "wrapped")
    assert merged["learned"]["fc"][3] == 50 * sum(range(len(outcomes)))


@pytest.mark.parametrize("source", ["gradient", "mixed", "inputs"])
def test_gradients_of_all_processes_count(outcomes, source):
    merged = equal(outcomes, source)
    whole = process_group_run.by_gradient(runs.batches(process_group_run.BATCHES), source)
    for name, entry in merged["learned"].items():
        assert entry[3] == whole[name].samples
        angles = torch.linalg.svdvals(entry[0].double() @ whole[name].components.T.double())
        assert angles.min() > 1 - 1e-6, name


def test_failing_gradient_is_told_to_the_others(outcomes):
    *others, last = (outcome["gradient failed"] for outcome in outcomes)
    assert last == "ValueError: no such label"
    assert others == [f"PeerError: process {len(others)} failed with {last}"] * len(others)


def test_groups_and_processes_alone(outcomes):
    for rank, outcome in enumerate(outcomes):
        assert outcome["alone"]["learned"]["out"][3] == 24 * (2 + rank)
    merged = equal(outcomes[-2:], "pair")
    size = len(outcomes)
    count = sum(len(process_group_run.share(rank, size)) for rank in (size - 2, size - 1))
    assert merged["learned"]["out"][3] == 24 * count
    # After all these failures the processes still understand each other.
    after, before = equal(outcomes, "after"), equal(outcomes, "exact")
    assert torch.equal(after["learned"]["out"][0], before["learned"]["out"][0])


@pytest.mark.parametrize("size", [2, 4])
def test_accelerate(tmp_path, size):
    launch("tests.scale.accelerate_run", tmp_path, size)
    first, *others = (
        LayerProjectors.load(tmp_path / f"{rank}-of-{size}.safetensors") for rank in range(size)
    )
    assert all(runs.same(first, other) for other in others)
    whole = fit_projectors(
        runs.model(), runs.batches(8), 3, targets=["query", "value", "out"], progress=False
    )
    assert first.shared == whole.shared
    for name, rows in captured(runs.batches(8)).items():
        assert first[name].samples == whole[name].samples
        assert excess(first[name], rows) < RandomizedSVD.guarantee.excess
