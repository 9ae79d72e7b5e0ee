"""Type of the options that other packages pass on to `fit_projectors`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from ipa_core import Learner
from ipa_torch._capture.forward import Forward
from ipa_torch._capture.row_weights import RowWeights
from ipa_torch._distributed.process_group import ProcessGroupArg
from ipa_torch._fit.checkpoint import CheckpointLike
from ipa_torch._fit.early_stopping import StoppingCriteria


class FitOptions(TypedDict, total=False):
    """Options of `fit_projectors` that a package with its own model and targets passes on.

    All of its parameters but ``model``, ``batches``, ``rank``, ``targets`` and ``on_missing``. For
    annotations: ``def adapt(model, **options: Unpack[FitOptions])``.

    Examples
    --------
    >>> from ipa_torch import FitOptions, StoppingCriteria
    >>> options: FitOptions = {"stop": StoppingCriteria(max_batches=8), "progress": False}
    """

    learner: Callable[[int], Learner]
    row_weights: RowWeights | None
    forward: Forward | None
    max_patches: int | None
    stop: StoppingCriteria | None
    max_bytes: int | None
    process_group: ProcessGroupArg
    checkpoint: CheckpointLike | None
    progress: bool
