"""Learners of layers: moments equal to those by hand, of inputs, outputs and heads."""

import hashlib
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from ipa_core import ExactCovariance, IncrementalPCA
from ipa_core.errors import SettingError, ShapeError
from ipa_torch import (
    HeadLearners,
    LayerError,
    LayerLearners,
    StoppingCriteria,
    fit_learners,
    fit_projectors,
)
from tests.torch.models import Transformer, decaying, mlp

ROOT = Path(__file__).parents[2]
quiet_fit = partial(fit_learners, progress=False)


def moment(rows):
    rows = rows.double().flatten(0, -2)
    return rows.T @ rows / len(rows)


def digest(learner):
    """Return a digest of all bytes of a learner's state."""
    state = hashlib.sha256()
    for key, value in sorted(learner.state_dict().items()):
        data = (
            value.cpu().numpy().tobytes()
            if isinstance(value, torch.Tensor)
            else repr(value).encode()
        )
        state.update(key.encode() + data)
    return state.hexdigest()


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_moments_of_inputs_are_those_by_hand():
    model, rows = mlp(12, 16, 4), decaying(800, 12)
    learners = quiet_fit(model, rows.split(90))
    assert isinstance(learners, LayerLearners) and list(learners) == ["0", "2"]
    assert difference(learners["0"].moment, moment(rows)) < 1e-6
    assert difference(learners["2"].moment, moment(model[:2](rows).detach())) < 1e-6
    assert learners["0"].samples == 800
    assert learners.stopped.keys() == learners.keys() and not learners.missing


def test_moments_of_outputs_are_those_by_hand():
    model, rows = mlp(12, 16, 4), decaying(800, 12)
    learners = quiet_fit(model, rows.split(90), source="outputs")
    assert difference(learners["0"].moment, moment(model[0](rows).detach())) < 1e-6
    assert difference(learners["2"].moment, moment(model(rows).detach())) < 1e-6


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_outputs_of_convolutions_are_channels(convolution):
    axes = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[convolution]
    model = nn.Sequential(convolution(3, 6, 2))
    x = torch.randn(5, 3, *[4] * axes)
    found = quiet_fit(model, [x], source="outputs", targets=["0"])["0"]
    assert difference(found.moment, moment(model(x).detach().movedim(1, -1))) < 1e-6
    alone = quiet_fit(model, [*x], source="outputs", targets=["0"])["0"]
    assert difference(alone.moment, found.moment) < 1e-6


def test_heads_are_blocks_of_the_last_axis():
    model, rows = mlp(12, 16, 4), decaying(300, 12)
    learners = quiet_fit(model, rows.split(70), source="outputs", heads=4)
    heads, outputs = learners["0"], model[0](rows).detach()
    assert isinstance(heads, HeadLearners) and len(heads) == 4 and heads.samples == 300
    for number, head in enumerate(heads):
        block = outputs[:, 4 * number : 4 * number + 4]
        assert difference(head.moment, moment(block)) < 1e-6
    merged = heads.merge(learners["0"])
    assert merged.samples == 600 and heads.samples == 300
    assert difference(merged[1].moment, heads[1].moment) < 1e-12


def test_padding_does_not_count_and_equal_inputs_are_learned_once():
    model = Transformer()
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 3:] = 0
    batch = {"input_ids": torch.randint(0, 20, (4, 6)), "attention_mask": mask}
    learners = quiet_fit(model, [batch])
    projectors = fit_projectors(model, [batch], 1, progress=False)
    assert learners.shared == projectors.shared
    assert any(len(names) > 2 for names in learners.shared)
    assert {learner.samples for learner in learners.values()} == {int(mask.sum())}
    outputs = quiet_fit(model, [batch], source="outputs")
    assert {learner.samples for learner in outputs.values()} == {int(mask.sum())}


def test_any_learner_and_rank():
    model, rows = mlp(12, 16, 4), decaying(300, 12)
    learners = quiet_fit(model, rows.split(50), {"0": 3, "2": 2}, learner=IncrementalPCA)
    assert [learner.rank for learner in learners.values()] == [3, 2]
    expected = fit_projectors(
        model, rows.split(50), {"0": 3, "2": 2}, learner=IncrementalPCA, progress=False
    )
    for name, learner in learners.items():
        assert torch.equal(learner.finalize().components, expected[name].components)


@pytest.mark.parametrize("options", [{}, {"source": "outputs"}, {"source": "outputs", "heads": 2}])
def test_a_memory_budget_divides_the_layers(options):
    model, rows = mlp(12, 16, 4), decaying(300, 12)
    whole = quiet_fit(model, rows.split(50), **options)
    parts = quiet_fit(model, rows.split(50), max_bytes=300_000, **options)
    assert (whole.passes, parts.passes) == (1, 2)
    assert list(parts) == list(whole)
    for name in whole:
        assert digest(whole[name]) == digest(parts[name])


def test_what_is_missing_is_told():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)
    with pytest.warns(UserWarning, match="expected a learner for every layer.*'idle'"):
        learners = quiet_fit(model, [torch.randn(9, 4)])
    assert list(learners) == ["used"] and "idle" in learners.missing
    with pytest.raises(LayerError, match="expected a learner"):
        quiet_fit(model, [torch.randn(9, 4)], on_missing="raise")


def test_wrong_calls_name_their_cure():
    model, rows = mlp(12, 16, 4), decaying(30, 12)
    with pytest.raises(SettingError, match="source to be 'inputs' or 'outputs'"):
        quiet_fit(model, [rows], source="weights")
    for heads in (0, 1.5, True, "two"):
        with pytest.raises(SettingError, match="heads to be an integer"):
            quiet_fit(model, [rows], heads=heads)
    with pytest.raises(SettingError, match="no tolerance with heads"):
        quiet_fit(model, [rows], heads=2, stop=StoppingCriteria(tolerance=0.1))
    with pytest.raises(ShapeError, match=r"layer '0'.*5 heads divide, got 16"):
        quiet_fit(model, [rows], source="outputs", heads=5)
    for options in ({}, {"source": "outputs"}, {"targets": ["1"], "source": "outputs"}):
        with pytest.raises(ShapeError, match=rf"layer '[01]'.* {10**30} heads divide, got "):
            quiet_fit(model, [rows], heads=10**30, **options)


KILLED = """
import os, signal, sys, torch
from ipa_torch import CheckpointConfig, fit_learners
sys.path.insert(0, {root!r})
from tests.torch.models import decaying, mlp
from tests.torch.test_learners import digest

torch.manual_seed(0)
model, calls, last = mlp(12, 16, 4), [], {last}

def forward(model, batch):
    calls.append(batch)
    if len(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    model(batch)

learners = fit_learners(
    model, decaying(800, 12).split(50), source="outputs", heads={heads}, forward=forward,
    checkpoint=CheckpointConfig({folder!r}, batches=3), progress=False,
)
print(len(calls), *map(digest, learners.values()))
"""


@pytest.mark.parametrize("heads", [None, 2])
def test_goes_on_after_a_kill_with_equal_bytes(tmp_path, heads):
    def run(folder, last):
        program = KILLED.format(root=str(ROOT), folder=str(folder), last=last, heads=heads)
        paths = os.pathsep.join(str(path) for path in sys.path if path)
        return subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )

    whole = run(tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    assert run(tmp_path / "killed", 11).returncode == -signal.SIGKILL
    resumed = run(tmp_path / "killed", 0)
    assert resumed.returncode == 0, resumed.stderr
    calls, *states = resumed.stdout.split()
    assert int(calls) == 16 - 9
    assert states == whole.stdout.split()[1:]


def test_checkpoints_of_another_source_are_refused(tmp_path):
    model, rows = mlp(12, 16, 4), decaying(100, 12)
    quiet_fit(model, rows.split(50), checkpoint=tmp_path)
    with pytest.raises(SettingError, match="outputs"):
        quiet_fit(model, rows.split(50), checkpoint=tmp_path, source="outputs")


def test_learner_has_the_moment_of_a_centered_one():
    model, rows = mlp(12, 4), decaying(300, 12) + 2.0
    learner = quiet_fit(model, [rows], learner=partial(ExactCovariance, center=True))["0"]
    assert difference(learner.moment, torch.cov(rows.double().T, correction=0)) < 1e-6
    assert torch.allclose(learner.mean, rows.double().mean(0))


RANKS = """
import sys, torch
from torch import distributed
from ipa_torch import fit_learners
sys.path.insert(0, {root!r})
from tests.torch.models import decaying, mlp
from tests.torch.test_learners import digest, moment, difference

torch.manual_seed(0)
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method={store!r}, rank=rank, world_size=2)
model, rows = mlp(12, 16, 4), decaying(800, 12)
mine = rows.split(50)[rank:4] if rank else rows.split(50)[4:] + rows.split(50)[:1]
for heads in (None, 2):
    learners = fit_learners(model, mine, heads=heads, progress=False)
    one = learners["0"][0] if heads else learners["0"]
    assert one.samples == 800
    assert difference(one.moment, moment(rows[:, :6] if heads else rows)) < 1e-6
    print(*map(digest, learners.values()))
nothing = fit_learners(model, [] if rank else mine, progress=False)
assert nothing["2"].samples == 650, nothing["2"]
distributed.destroy_process_group()  # without it gloo's threads may abort an exit
"""


def test_all_ranks_get_the_learners_of_all_rows(tmp_path):
    program = RANKS.format(root=str(ROOT), store=f"file://{tmp_path / 'store'}")
    paths = os.pathsep.join(str(path) for path in sys.path if path)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank)],
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (first, error), (second, other) = (rank.communicate(timeout=120) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], error + other
    assert first.split() and first == second
