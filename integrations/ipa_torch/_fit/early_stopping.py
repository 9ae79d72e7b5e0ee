"""Stopping criteria of a fit: budgets, and an estimate of the excess error."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ipa_core import Learner, Projector
from ipa_core.errors import SettingError
from ipa_torch._capture.eval_mode import no_autocast
from ipa_torch._capture.row_consumer import RowConsumer
from ipa_torch.errors import check_choice

OnError: TypeAlias = Literal["raise", "return"]

#: Batches before a layer may count as converged: fewer may be alike by chance.
MIN_BATCHES = 12

#: Reason to stop of a fit that used all batches.
DATA_EXHAUSTED = "the batches ended"


@dataclass(frozen=True)
class StoppingCriteria:
    """Criteria that end a fit before its batches do; the first that holds counts.

    Budgets are checked after each batch: a batch that has begun is finished.

    Parameters
    ----------
    max_rows : int, optional
        Rows of each layer; a layer stops once it has as many. A row counts once, however many
        passes its learner makes.
    max_batches : int, optional
        Batches of each pass.
    max_seconds : float, optional
        Seconds of each pass.
    tolerance : float, optional
        Excess of the reconstruction error over the best possible one, relative to it: 1e-2 is one
        per cent. A layer stops when its excess is estimated to be at most this, on rows that its
        learner has not absorbed, and not before 12 batches. The fit ends when all layers have
        stopped.
    on_error : {"raise", "return"}, default "raise"
        "return" ends the fit on an exception of a forward pass, or Ctrl-C, with a warning, and
        returns the projectors learned so far. A layer with an invalid input (NaN) is then left out,
        and the others go on.

    Raises
    ------
    SettingError
        If a number is not above 0, or ``on_error`` is something else.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import StoppingCriteria, fit_projectors
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
    >>> batches, stop = [torch.randn(8, 4)] * 9, StoppingCriteria(max_batches=3)
    >>> fit_projectors(model, batches, rank=1, stop=stop, progress=False).stopped
    {'0': 'max_batches of 3 reached'}
    """

    max_rows: int | None = None
    max_batches: int | None = None
    max_seconds: float | None = None
    tolerance: float | None = None
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_batches", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingError(f"expected {name} above 0 or None, got {value!r}")
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise SettingError(
                f"expected a tolerance above 0 and finite, or None, got {self.tolerance!r}"
            )
        check_choice("on_error", self.on_error, OnError)

    def exhausted_budget(self, batches: int, seconds: float) -> str | None:
        """Return which budget of the whole fit is used up, or None."""
        if self.max_batches is not None and batches >= self.max_batches:
            return f"max_batches of {self.max_batches:,} reached"
        if self.max_seconds is not None and seconds >= self.max_seconds:
            return f"max_seconds of {self.max_seconds:g} reached"
        return None


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
            with no_autocast(rows.device):
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
        restored.estimate, restored._last, batches, checkpoint = state["numbers"].tolist()
        restored._batches, restored._checkpoint = int(batches), int(checkpoint)
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
