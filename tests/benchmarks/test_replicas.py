"""Replicas trained at once are the runs trained alone."""

import json
import math

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft")

from benchmarks import gpu_study
from benchmarks.evidence import bundle
from benchmarks.evidence.cells import Cells
from benchmarks.evidence.likelihood_methods import LIKELIHOOD
from benchmarks.evidence.methods import Adapter
from benchmarks.evidence.replicas import schedule
from benchmarks.evidence.task import collate
from benchmarks.gpu_bundle import Plan, toy, write
from benchmarks.likelihood import LikelihoodStudy

PLAN = Plan(Plan().methods, steps=25, seeds=2, checkpoints=(10,))
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares on the CPU")


@pytest.fixture(scope="module")
def task_and_settings(tmp_path_factory):
    return toy(PLAN, tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def folder(task_and_settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    write(PLAN, *task_and_settings, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    with pytest.MonkeyPatch.context() as patch:  # several lengths, batches in two parts
        patch.setattr(gpu_study, "PADDED", 2)
        patch.setattr(gpu_study, "POSITIONS", 36 * 4 * 7)
        return gpu_study.run(PLAN, folder, 600.0, lambda value: None)


@pytest.fixture(scope="module")
def study(folder):
    return gpu_study.build(*bundle.read(folder, "again"))


@pytest.mark.parametrize("method", PLAN.methods)
def test_replica_is_the_run_alone(method, found, task_and_settings, tmp_path):
    task, settings, _ = task_and_settings
    cells = Cells(tmp_path / "cells.jsonl", "python -m toy")
    alone = LikelihoodStudy("toy", task, settings, cells, methods=LIKELIHOOD)
    adapter, together = Adapter(task, settings), found["methods"][method]
    for rate, validated in together["validation"].items():
        for seed, nats in enumerate(validated):
            cell = alone.cell(adapter, method, seed, float(rate))
            assert nats == pytest.approx(cell.validation["toy"], abs=1e-4)
            if float(rate) == together["rate"]:
                assert together["nats"][seed] == pytest.approx(cell.test["toy"], abs=1e-4)
                assert together["other"][seed] == pytest.approx(cell.test["other"], abs=1e-4)


def test_best_rate_is_below_no_training(found):
    for method in found["methods"].values():
        assert method["mean"] < found["untrained"]["test"]
    assert len(found["seconds_by_length"]) > 1
    assert found["checkpoints"].keys() == {"10"}
    assert json.loads(json.dumps(found)) == found


def test_padding_on_the_right_needs_no_mask(study, task_and_settings):
    task, *_ = task_and_settings
    places = study.texts["validation"].lengths.argsort()[[0, 5, -1]]
    batch = collate([task.parts["validation"][place] for place in places])
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        masked, row = task.fresh(0)(batch)
        losses = study.training.replicas.losses(batch["inputs_embeds"][None], batch["labels"][None])
    for found in losses:
        torch.testing.assert_close(found[batch["labels"][:, 1:] != -100], masked)


def test_gradient_of_a_replica_is_that_of_its_own_loss(study):
    study.begin(PLAN.steps)
    replicas = study.training.replicas
    hidden, labels = torch.randn(2, 3, 5, 16), torch.randint(11, (2, 3, 5))
    b = replicas.parameters[:, replicas.of_a :]
    b.copy_(torch.randn_like(b))
    replicas.gradients.zero_()
    replicas.backward(replicas.losses(hidden, labels).sum())
    together = replicas.gradients.clone()
    assert together.abs().amax(1).min() > 0
    for one in (0, 20):
        replicas.gradients.zero_()
        replicas.backward(replicas.losses(hidden, labels)[one].sum())
        torch.testing.assert_close(replicas.gradients[one], together[one])
        assert not replicas.gradients[torch.arange(len(together)) != one].any()


class CalledOperators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_no_number(study):
    study.begin(PLAN.steps)
    with CalledOperators() as called:
        study.training.step(7)
    assert {"bmm", "index_select", "lerp_"} <= called.names
    assert not called.names & {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh"}
    with CalledOperators() as called:
        float(study.training.curve[0].mean())
    assert "_local_scalar_dense" in called.names


@pytest.mark.parametrize("spent", [0.0, 3.0])
def test_schedule_is_that_of_transformers_and_adamw(spent):
    steps, parameter = 20, torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.0)
    linear = transformers.get_linear_schedule_with_warmup(
        optimizer, round(0.1 * (steps - spent)), round(steps - spent)
    )
    table = schedule(steps, [0.01], [spent], 0.1)
    for number, (rate, second) in enumerate(table.tolist()):
        expected = optimizer.param_groups[0]["lr"] if number < steps - spent else 0.0
        assert rate * (1 - 0.9 ** (number + 1)) == pytest.approx(expected)
        assert second**2 == pytest.approx(1 - 0.999 ** (number + 1))
        optimizer.step()
        linear.step()


def test_schedule_needs_a_step_beside_those_of_a():
    with pytest.raises(ValueError, match="expected A to cost less than 4 steps, got 4"):
        schedule(4, [0.1, 0.1], [0.0, 4.0], 0.1)


def test_a_rate_that_diverged_is_not_chosen():
    runs = [gpu_study.Replica("LoRA", 0, rate) for rate in (0.1, 0.2, 0.3)]
    found = gpu_study.chosen(runs, [math.nan, 2.0, 3.0])["LoRA"]
    assert (found["rate"], found["edge"]) == (0.2, False)
    assert gpu_study.chosen(runs, [math.nan] * 3)["LoRA"]["rate"] == 0.1


def test_steps_that_fit():
    assert gpu_study.fitting([0.1] * 2000, 2000, 250.0) == 2000
    assert gpu_study.fitting([0.1] * 2000, 2000, 79.0) == 700
    assert gpu_study.fitting([0.1] * 2000, 2000, -1.0) == 100
    assert gpu_study.fitting([0.1] * 12, 12, 0.0) == 12


def test_bundle_is_cut_into_parts_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "PART", 1000)
    tensors = {
        "half": torch.randn(40, 30).to(torch.bfloat16),
        "whole": torch.randn(3, 2, dtype=torch.float64)[:, 1:],
        "unquantized": torch.randn(2, 32),
        "quantized": (torch.arange(192).view(3, 64) * 5 % 16) * 0.5
        + torch.tensor([[-1.0], [0.25], [7.0]]),
        "numbers": torch.arange(5, dtype=torch.int32),
    }
    manifest, first, *more = bundle.write(tmp_path, {"rank": 8}, tensors)
    assert manifest.name == "bundle.json" and first.stat().st_size == 1000 and more
    settings, found = bundle.read(tmp_path, "python -m pack")
    assert settings == {"rank": 8} and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    kinds = {name: kind for name, (kind, _) in json.loads(manifest.read_text())["tensors"].items()}
    assert kinds["quantized"] == bundle.FOUR_BITS and kinds["unquantized"] == "float32"
    content = first.read_bytes()
    first.write_bytes(content[:-1] + b"?")
    with pytest.raises(bundle.BundleError, match="got other bytes; run python -m pack"):
        bundle.read(tmp_path, "python -m pack")
    first.unlink()
    with pytest.raises(bundle.BundleError, match=r"bundle-0\.bin, got no such file; run python -m"):
        bundle.read(tmp_path, "python -m pack")
