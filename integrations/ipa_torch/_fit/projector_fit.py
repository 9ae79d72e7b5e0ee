"""Fit of projectors to the input activations of a model's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ipa_core import Learner, RandomizedSVD
from ipa_core.learners.factory import make_learner
from ipa_torch._capture.attention_mask import attention_mask
from ipa_torch._capture.forward import Forward
from ipa_torch._capture.row_weights import RowWeights
from ipa_torch._distributed.process_group import ProcessGroupArg
from ipa_torch._fit.checkpoint import CheckpointLike
from ipa_torch._fit.early_stopping import StoppingCriteria
from ipa_torch._fit.fit_loop import run_fit
from ipa_torch._fit.merge_results import PROJECTORS
from ipa_torch._fit.missing_layers import OnMissing, report_missing
from ipa_torch._layers.targets import ALL_LINEAR, Targets
from ipa_torch._settings import check_choice
from ipa_torch.layer_projectors import LayerProjectors


def fit_projectors(
    model: nn.Module,
    batches: Iterable[Any],
    rank: int | Mapping[str, int],
    *,
    targets: Targets = ALL_LINEAR,
    learner: Callable[[int], Learner] = RandomizedSVD,
    row_weights: RowWeights | None = attention_mask,
    forward: Forward | None = None,
    max_patches: int | None = 8192,
    stop: StoppingCriteria | None = None,
    max_bytes: int | None = None,
    process_group: ProcessGroupArg = "world",
    checkpoint: CheckpointLike | None = None,
    on_missing: OnMissing = "warn",
    progress: bool = True,
) -> LayerProjectors:
    r"""Learn a projection of each layer's inputs with the least reconstruction error.

    For each layer with inputs x, over all batches in one pass,

    .. math:: \min_{P P^\top = I_r} \sum_i w_i \|x_i - P^\top P x_i\|^2 .

    The model runs in evaluation mode without gradients. Its training flags, hooks and random
    states are restored afterwards, also after an exception. Layers that are given the same tensor
    share one learner and get the identical projector.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    batches : iterable
        Calibration data: a ``DataLoader``, a list or a generator, with or without a length.
    rank : int or mapping of str to int
        Rows of P for all layers, or for each by name.
    targets : list of str, str, callable, default "all-linear"
        Layers to fit; see `select_layers`.
    learner : callable, default `ipa_core.RandomizedSVD`
        Makes a learner from a rank: a `Learner` class, or ``functools.partial`` of it.
    row_weights : callable or None, default `attention_mask`
        Returns the weight of each row of a batch, of shape (batch, positions), say: rows of weight
        0 (padding) do not count, a row of weight 2 counts twice. The weights apply to activations
        whose leading axes have this shape, or its product; all rows of others count, with a warning
        of the layers' names unless they are pooled. A list of weights is for activations of several
        shapes. None: every row counts.
    forward : callable, optional
        ``forward(model, batch)`` runs the model. By default a mapping is passed as keywords, a
        tuple or list by position, anything else as the only argument, on the model's device.
    max_patches : int or None, default 8192
        Patches of a convolution to use in each batch: a stratified random sample of the positions.
        None uses all.
    stop : StoppingCriteria, optional
        Budgets of rows, batches and seconds, a tolerance, and the handling of exceptions. By
        default all batches are used. `LayerProjectors.stopped` has each layer's reason.
    max_bytes : int, optional
        Memory budget of the learners. Layers whose learners do not fit together are fitted in
        several passes over the batches, with the same result; the budgets of ``stop`` hold for each
        pass. `LayerProjectors.passes` is the number of passes. The budget covers what learners
        hold while a batch is read, not the temporary workspace of an update.
    process_group : "world", torch.distributed.ProcessGroup or None, default "world"
        With `torch.distributed` initialized, each rank reads its own batches, however many, and all
        get the same projectors, of all ranks' rows: all ranks of the group must make the call.
        "world": all ranks; None: this process alone. ``stop`` applies to each rank.
    checkpoint : path-like or CheckpointConfig, optional
        Folder for checkpoints, written every five minutes (or as `CheckpointConfig` says) and at
        the end. If it holds a checkpoint, the fit resumes from it: the batches already used are
        read, compared and skipped, and the result is that of an uninterrupted run.
    on_missing : {"warn", "raise", "ignore"}, default "warn"
        Action for layers without a projector, such as those that never ran; the others are
        returned.
    progress : bool, default True
        Show a progress bar with rows (tokens) per second, on a terminal.

    Returns
    -------
    LayerProjectors
        From layer names to projectors, each on its layer's device, in float32 or wider.

    Raises
    ------
    LayerError
        If ``targets`` match nothing, a mapping of ranks leaves out a layer, or layers never ran
        (``on_missing="raise"``, or when none ran).
    EmptyStreamError
        If there is no batch.
    StreamError
        If several passes may be needed and the batches can be read only once, or the batches
        differ from those a checkpoint has used.
    PeerError
        If another rank failed; the message has its error.
    FileFormatError, SettingError
        If a checkpoint is damaged, or of a run with other settings.
    RankError, NonFiniteError, ArrayTypeError, ShapeError, WeightError
        If a layer's input is invalid; the message names the layer.

    Notes
    -----
    Cost beside the forward passes, with the default learner, for n rows of d features: O((8r + 32)
    n d) operations and O((8r + 32) d) numbers for each distinct input.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import fit_projectors
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> batches = [torch.randn(32, 16) for _ in range(4)]
    >>> list(fit_projectors(model, batches, rank=2, progress=False))
    ['0', '2']
    """
    check_choice("on_missing", on_missing, OnMissing)
    projectors = run_fit(
        model,
        batches,
        rank,
        PROJECTORS,
        targets=targets,
        learner=partial(make_learner, learner),
        row_weights=row_weights,
        forward=forward,
        max_patches=max_patches,
        stop=stop,
        max_bytes=max_bytes,
        process_group=process_group,
        checkpoint=checkpoint,
        progress=progress,
    )
    report_missing(projectors, on_missing)
    return projectors
