"""When a layer has seen enough."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ipa_core import Learner, Projector
from ipa_core.errors import SettingError

#: Batches before a layer may count as converged: fewer may be alike by chance.
LEAST_BATCHES = 12

ENDED = "the batches ended"


@dataclass(frozen=True)
class Budget:
    """What may be spent: rows for each layer, batches and seconds for all; None for no limit."""

    rows: int | None
    batches: int | None
    seconds: float | None
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        for name in ("rows", "batches", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingError(f"expected max_{name} above 0 or None, got {value!r}")

    def spent(self, batches: int) -> str | None:
        """Return why learning ends after so many batches, if it does."""
        if self.batches is not None and batches >= self.batches:
            return f"max_batches of {self.batches:,} reached"
        if self.seconds is not None and time.monotonic() - self.start >= self.seconds:
            return f"max_seconds of {self.seconds:g} reached"
        return None


class Convergence:
    r"""Estimates what a learner may still gain, on rows that it has not absorbed.

    P after n rows and P after 1.5 n rows are both scored on the rows from 1.5 n to 2 n:

    .. math:: D = \sum_i (e_i^{n} - e_i^{1.5 n}) \, / \, \sum_i e_i^{1.5 n}

    with residuals :math:`e_i`. As excess error falls like 1 / rows, D is about the excess that
    remains, and so is half of the D before; the estimate is the larger magnitude of the two, as
    one alone is near zero by chance now and then. At 2 n rows it is held against the tolerance, and
    n doubles. Only residuals are compared: directions of equal energy may turn for ever without
    keeping it from ending.

    Cost: two skinny products on a third of the rows, two projectors for each doubling.
    """

    def __init__(self, tolerance: float) -> None:
        if not (math.isfinite(tolerance) and tolerance > 0):
            raise SettingError(f"expected a tolerance above 0, got {tolerance!r}")
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
        """Whether the estimate is within the tolerance."""
        return self._batches >= LEAST_BATCHES and self.estimate <= self.tolerance

    def look(
        self, learner: Learner, rows: torch.Tensor, weights: torch.Tensor | None
    ) -> Convergence:
        """Return the state after a batch that the learner is about to absorb."""
        after = copy.copy(self)
        after._batches += 1
        if learner.samples:
            after._advance(learner)
        if after._now is not None:
            after._score(rows, weights)
        return after

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the estimate and what the next one is made from, as tensors."""
        numbers = [self.estimate, self._last, self._batches, self._checkpoint]
        state = {"numbers": torch.tensor(numbers, dtype=torch.float64)}
        for key, projector in (("half", self._half), ("now", self._now)):
            if projector is not None:
                totals = [projector.total_energy, projector.samples]
                state[f"{key}.components"] = projector.components
                state[f"{key}.mean"] = projector.mean
                state[f"{key}.energies"] = projector.energies
                state[f"{key}.totals"] = torch.tensor(totals, dtype=torch.float64)
        return state if self._sums is None else state | {"sums": self._sums}

    def with_state(self, state: Mapping[str, torch.Tensor]) -> Convergence:
        """Return the estimate that `state_dict` gave, with this one's tolerance."""
        fresh = Convergence(self.tolerance)
        fresh.estimate, fresh._last, batches, checkpoint = state["numbers"].tolist()
        fresh._batches, fresh._checkpoint = int(batches), int(checkpoint)
        fresh._half, fresh._now = _projector(state, "half"), _projector(state, "now")
        fresh._sums = state.get("sums")
        return fresh

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
            residuals = residuals * weights.to(residuals.dtype)
        sums = residuals.sum(1, dtype=torch.float64)
        self._sums = sums if self._sums is None else self._sums + sums


def _projector(state: Mapping[str, torch.Tensor], key: str) -> Projector | None:
    if f"{key}.components" not in state:
        return None
    components, mean, energies = (state[f"{key}.{p}"] for p in ("components", "mean", "energies"))
    total, samples = state[f"{key}.totals"].tolist()
    return Projector(components, mean, energies, total, int(samples))


def _residual(projector: Projector, rows: torch.Tensor) -> torch.Tensor:
    rows = rows - projector.mean
    kept: torch.Tensor = (rows @ projector.components.T).square().sum(1)
    return rows.square().sum(1) - kept


def _excess(sums: torch.Tensor, projector: Projector | None) -> float:
    assert projector is not None
    before, now, energy = sums.tolist()
    rounding = 100 * torch.finfo(projector.components.dtype).eps * energy
    return 0.0 if now <= rounding else abs(before - now) / now
