"""Estimate of the excess error of a learner that still learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch

from ipa_core import Learner, Projector
from ipa_core.errors import FileFormatError
from ipa_core.settings import integer
from ipa_torch._capture.autocast import no_grad_or_autocast
from ipa_torch._capture.row_consumer import RowConsumer
from ipa_torch._float64 import in_float64

#: Batches before a layer may count as converged: fewer may be alike by chance.
MIN_BATCHES = 12


class Convergence:
    r"""Estimate of the excess error that remains, on rows that the learner has not absorbed.

    P after n rows and P after 1.5 n rows are both scored on the rows from 1.5 n to 2 n:

    .. math:: D = \sum_i (e_i^{n} - e_i^{1.5 n}) \, / \, \sum_i e_i^{1.5 n}

    with residuals :math:`e_i`. As excess error falls like 1 / rows, D is about the excess that
    remains, and so is half of the previous D; the estimate is the larger magnitude of the two,
    since a single D is near zero by chance now and then. At 2 n rows the estimate is compared with
    the tolerance, and n doubles. Only residuals are compared: directions of equal energy may rotate
    without end and do not prevent convergence.

    Cost: two skinny products on a third of the rows, two projectors for each doubling.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.estimate = math.inf
        self._last = math.inf
        self._batches = 0
        self._checkpoint = 0
        self._half: Projector | None = None
        self._now: Projector | None = None
        self._sums: torch.Tensor | None = None  # of both residuals and of the energy

    @property
    def reached(self) -> bool:
        """True if the estimate is within the tolerance."""
        return self._batches >= MIN_BATCHES and self.estimate <= self.tolerance

    def observe(
        self, learner: RowConsumer, rows: torch.Tensor, weights: torch.Tensor | None
    ) -> Convergence:
        """Return the estimate after rows that the learner is about to absorb."""
        after = copy.copy(self)
        after._batches += 1
        if learner.samples:
            assert isinstance(learner, Learner)  # the only consumers with a tolerance
            after._advance(learner)
        if after._now is not None:
            with no_grad_or_autocast(rows.device):
                after._score(rows, weights)
        return after

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the estimate and the sums of the next estimate, as tensors."""
        numbers = [self.estimate, self._last, self._batches, self._checkpoint]
        state = {"numbers": torch.tensor(numbers, dtype=torch.float64, device="cpu")}
        for key, projector in (("half", self._half), ("now", self._now)):
            if projector is not None:
                totals = [projector.total_energy, projector.samples]
                state[f"{key}.components"] = projector.components
                state[f"{key}.mean"] = projector.mean
                state[f"{key}.energies"] = projector.energies
                state[f"{key}.totals"] = torch.tensor(totals, dtype=torch.float64, device="cpu")
        return state if self._sums is None else state | {"sums": self._sums}

    def with_state(self, state: Mapping[str, torch.Tensor]) -> Convergence:
        """Return the estimate of a `state_dict`, with the same tolerance."""
        restored = Convergence(self.tolerance)
        restored.estimate, restored._last, *counts = state["numbers"].tolist()
        restored._batches, restored._checkpoint = map(_count, counts)
        restored._half, restored._now = _projector(state, "half"), _projector(state, "now")
        restored._sums = state.get("sums")
        return restored

    def _advance(self, learner: Learner) -> None:
        seen = learner.samples
        if self._half is None or (self._sums is not None and seen >= 2 * self._checkpoint):
            if self._sums is not None:
                last, self._last = self._last, _excess(self._sums, self._half)
                self.estimate = max(self._last, last / 2)
            self._half, self._now, self._sums = learner.finalize(), None, None
            self._checkpoint = seen
        elif self._now is None and seen >= 1.5 * self._checkpoint:
            self._now = learner.finalize()

    def _score(self, rows: torch.Tensor, weights: torch.Tensor | None) -> None:
        assert self._half is not None and self._now is not None
        rows = rows.to(self._now.components.dtype)
        energy = rows.square().sum(1)
        residuals = torch.stack([_residual(p, rows) for p in (self._half, self._now)] + [energy])
        if weights is not None:
            residuals = residuals * weights.to(residuals)
        sums = in_float64(residuals).sum(1)
        self._sums = sums if self._sums is None else self._sums + sums


def _projector(state: Mapping[str, torch.Tensor], key: str) -> Projector | None:
    if f"{key}.components" not in state:
        return None
    components, mean, energies = (state[f"{key}.{p}"] for p in ("components", "mean", "energies"))
    total, samples = state[f"{key}.totals"].tolist()
    return Projector(components, mean, energies, total, _count(samples))


def _count(value: float) -> int:
    """Return a count that a tensor of a state holds."""
    count = int(value) if value.is_integer() else value
    return integer("a count of the state of a convergence", count, least=0, error=FileFormatError)


def _residual(projector: Projector, rows: torch.Tensor) -> torch.Tensor:
    rows = rows - projector.mean
    kept: torch.Tensor = (rows @ projector.components.T).square().sum(1)
    return rows.square().sum(1) - kept


def _excess(sums: torch.Tensor, projector: Projector | None) -> float:
    assert projector is not None
    before, now, energy = sums.tolist()
    rounding = 100 * torch.finfo(projector.components.dtype).eps * energy
    return 0.0 if now <= rounding else abs(before - now) / now
