"""The walk over foreign models finds what is wrong, and tells it from what is refused."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import foreign_walk
from benchmarks.foreign_models import MODELS, flat


def small():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_plain_models_work():
    assert foreign_walk.check(small, flat(8)).verdict == "works"
    convolutions = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, groups=2), nn.Conv1d(6, 2, 2))
    outcome = foreign_walk.check(lambda: convolutions, lambda: (torch.randn(2, 4, 9),))
    assert outcome.layers == 2 and outcome.verdict == "works"


def test_refusals_are_told_from_wrong_results(monkeypatch):
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight / 2, self.bias)

    assert "not merged" in foreign_walk.check(lambda: nn.Sequential(Scaled(8, 4)), flat(8)).verdict
    assert foreign_walk.check(lambda: nn.Sequential(nn.LayerNorm(8)), flat(8)).refused
    assert "without adapters" in foreign_walk.check(lambda: nn.Sequential(small()), flat(9)).verdict
    monkeypatch.setattr(foreign_walk, "merge", lambda model: model[0].weight.data.zero_())
    assert "WRONG: merged outputs" in foreign_walk.check(small, flat(8)).verdict
    monkeypatch.setattr(foreign_walk, "attach", lambda *_: 1 / 0)
    assert "WRONG: raw ZeroDivisionError" in foreign_walk.check(small, flat(8)).verdict


def test_enough_packages():
    assert len({package for package, *_ in MODELS}) >= 25
