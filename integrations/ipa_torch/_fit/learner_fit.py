"""Fit of learners, such as second moments, to the activations of a model's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ipa_core import ExactCovariance, Learner
from ipa_core.learners.factory import make_learner
from ipa_core.settings import integer
from ipa_torch._capture.attention_mask import attention_mask
from ipa_torch._capture.forward import Forward
from ipa_torch._capture.row_weights import RowWeights
from ipa_torch._distributed.process_group import ProcessGroupArg
from ipa_torch._fit.attention_head_learners import by_head
from ipa_torch._fit.checkpoint import CheckpointLike
from ipa_torch._fit.collector import Source
from ipa_torch._fit.early_stopping import StoppingCriteria
from ipa_torch._fit.fit_loop import run_fit
from ipa_torch._fit.merge_results import LEARNERS
from ipa_torch._fit.missing_layers import OnMissing, report_missing
from ipa_torch._layers.targets import ALL_LINEAR, Targets
from ipa_torch._settings import check_choice
from ipa_torch.layer_projectors import LayerLearners


def fit_learners(
    model: nn.Module,
    batches: Iterable[Any],
    rank: int | Mapping[str, int] = 1,
    *,
    source: Source = "inputs",
    heads: int | None = None,
    targets: Targets = ALL_LINEAR,
    learner: Callable[[int], Learner] = ExactCovariance,
    row_weights: RowWeights | None = attention_mask,
    forward: Forward | None = None,
    max_patches: int | None = 8192,
    stop: StoppingCriteria | None = None,
    max_bytes: int | None = None,
    process_group: ProcessGroupArg = "world",
    checkpoint: CheckpointLike | None = None,
    on_missing: OnMissing = "warn",
    progress: bool = True,
) -> LayerLearners:
    r"""Fit learners to each layer's activations, and return them instead of projectors.

    With the default learner these are second moments, the Hessians of GPTQ up to a factor:
    ``learners[name].moment`` is the mean of :math:`x x^\top`.

    Parameters
    ----------
    model, batches, targets, row_weights, forward, stop, max_bytes, process_group, checkpoint
        As for `fit_projectors`.
    rank : int or mapping of str to int, default 1
        Rank of the learners, for `Learner.finalize`; a moment does not depend on it.
    source : {"inputs", "outputs"}, default "inputs"
        Activations to learn from. Outputs are rows of features, of channels for convolutions.
    heads : int, optional
        Number of equal blocks of the last axis, each with its own learner: the value of a layer is
        then a `HeadLearners`, a sequence of learners.
    learner : callable, default `ipa_core.ExactCovariance`
        Makes a learner from a rank: a `Learner` class, or ``functools.partial`` of it.
    max_patches : int or None, default 8192
        Patches of a convolution's input to use in each batch; of outputs all positions are used.
    on_missing : {"warn", "raise", "ignore"}, default "warn"
        Action for layers without a learner, such as those that never ran.
    progress : bool, default True
        Show a progress bar on a terminal.

    Returns
    -------
    LayerLearners
        From layer names to learners, on the layers' devices. Layers with the same activations
        share a learner.

    Raises
    ------
    SettingError
        If ``source`` or ``heads`` has another value, or ``heads`` is combined with a tolerance.
    ShapeError
        If the heads do not divide an activation's features; the message names the layer.
    LayerError, EmptyStreamError, StreamError, PeerError, FileFormatError
        As for `fit_projectors`.

    Notes
    -----
    Cost beside the forward passes, with the default learner, for n rows of d features: O(n d^2)
    operations and d^2 float64 numbers for each distinct activation.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import fit_learners
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(3, 2)), torch.randn(8, 3)
    >>> moment = fit_learners(model, [x], progress=False)["0"].moment
    >>> torch.allclose(moment.float(), x.T @ x / 8, atol=1e-6)
    True
    """
    check_choice("on_missing", on_missing, OnMissing)
    check_choice("source", source, Source)
    make = partial(make_learner, learner)
    if heads is not None:
        heads = integer("heads", heads, least=1, cure="pass None for no division into heads")
    learners = run_fit(
        model,
        batches,
        rank,
        LEARNERS,
        targets=targets,
        learner=make if heads is None else by_head(make, heads, stop),
        row_weights=row_weights,
        forward=forward,
        max_patches=max_patches,
        stop=stop,
        max_bytes=max_bytes,
        process_group=process_group,
        checkpoint=checkpoint,
        progress=progress,
        source=source,
        settings={"source": source, "heads": heads},
    )
    report_missing(learners, on_missing, "learner")
    return learners
