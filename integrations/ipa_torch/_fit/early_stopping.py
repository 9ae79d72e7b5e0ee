"""Stopping criteria of a fit: budgets, and a tolerance of the excess error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ipa_core.settings import check_instance, number
from ipa_torch._settings import check_choice, check_positive

_CURE = "pass stop=StoppingCriteria(max_rows=...), for example"

OnError: TypeAlias = Literal["raise", "return"]


#: Reason to stop of a fit that used all batches.
DATA_EXHAUSTED = "the batches ended"
#: Message of the error for data without any batch.
NO_BATCH = (
    "expected at least one batch, got none; check that the loader is neither empty nor used up"
)


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
            check_positive(name, getattr(self, name))
        if self.tolerance is not None:
            form = "above 0 and finite, or None"
            valid = number("tolerance", self.tolerance, form=form, valid=lambda x: 0 < x < math.inf)
            object.__setattr__(self, "tolerance", valid)
        check_choice("on_error", self.on_error, OnError)

    @classmethod
    def of(cls, stop: StoppingCriteria | None) -> StoppingCriteria:
        """Return the criteria, or none of them for None."""
        if stop is None:
            return cls()
        check_instance("stop", stop, cls, "StoppingCriteria or None", cure=_CURE)
        return stop

    def exhausted_budget(self, batches: int, seconds: float) -> str | None:
        """Return which budget of the whole fit is used up, or None."""
        if self.max_batches is not None and batches >= self.max_batches:
            return f"max_batches of {self.max_batches:,} reached"
        if self.max_seconds is not None and seconds >= self.max_seconds:
            return f"max_seconds of {self.max_seconds:g} reached"
        return None
