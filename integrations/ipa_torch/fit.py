"""The one call: from a model and its data to projectors of its layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import nn
from tqdm.auto import tqdm

from ipa_core import Learner, RandomizedSVD
from ipa_core.errors import EmptyStreamError, SettingError, StreamError
from ipa_torch.errors import LayerError
from ipa_torch.feeding import Forward, feed
from ipa_torch.listening import Listener
from ipa_torch.projectors import Projectors, rank_for
from ipa_torch.quiet import undisturbed
from ipa_torch.targets import ALL_LINEAR, Targets, select_layers
from ipa_torch.weighting import RowFilter, RowWeights, attention_mask

OnMissing = Literal["warn", "raise", "ignore"]


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
    on_missing: OnMissing = "warn",
    progress: bool = True,
) -> Projectors:
    r"""Learn, for layers of a model, the projections from which their inputs are best rebuilt.

    For each layer with inputs x, over all batches in one pass,

    .. math:: \min_{P P^\top = I_r} \sum_i w_i \|x_i - P^\top P x_i\|^2 .

    The model runs in evaluation mode without gradients; its training flags, hooks and random
    states are afterwards as before, whatever happens. Layers that are given the same tensor share
    one learner and get the identical projector.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    batches : iterable
        A ``DataLoader``, a list, a generator: what the model is run on. It need not have a length.
    rank : int or mapping of str to int
        Rows of P for all layers, or for each by name.
    targets : list of str, str, callable, default "all-linear"
        Which layers; see `select_layers`.
    learner : callable, default `ipa_core.RandomizedSVD`
        Makes a learner from a rank: a `Learner` class, or ``functools.partial`` of one.
    row_weights : callable or None, default `attention_mask`
        Gives for a batch the weight of each row, of shape (batch, positions), say: rows of weight 0
        (padding) do not count, a row of weight 2 counts twice. It holds for activations whose
        leading axes have this shape, or its product; others count whole. None: every row counts.
    forward : callable, optional
        ``forward(model, batch)`` runs the model. By default a mapping is passed as keywords, a
        tuple or list by position, anything else as the one argument, on the model's device.
    max_patches : int or None, default 8192
        Places of a convolution to take patches at, in each batch: a random choice, spread evenly.
        None takes all of them.
    on_missing : {"warn", "raise", "ignore"}, default "warn"
        What to do about layers whose forward never ran; the others are returned.
    progress : bool, default True
        Show a bar with rows (tokens) a second, on a terminal.

    Returns
    -------
    Projectors
        From layer names to projectors, each on its layer's device, float32 at least.

    Raises
    ------
    LayerError
        If ``targets`` match nothing, a mapping of ranks leaves out a layer, or layers never ran
        (``on_missing="raise"``, or when none ran).
    EmptyStreamError
        If there is no batch.
    RankError, NonFiniteError, ArrayTypeError, ShapeError, WeightError
        If a layer's input is unfit; the message names the layer.

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
    >>> fit_projectors(model, batches, rank=2, progress=False)
    Projectors(2 layers, 2 projectors)
    """
    if on_missing not in ("warn", "raise", "ignore"):
        raise SettingError(
            f"expected on_missing to be 'warn', 'raise' or 'ignore', got {on_missing!r}"
        )
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    layers = select_layers(model, targets)
    ranks = {name: rank_for(name, rank) for name in layers}
    listener = Listener(layers, ranks, learner, RowFilter(model, row_weights), max_patches)
    run = feed if forward is None else forward
    with undisturbed(model), listener, _bar(progress) as bar:
        seen = 0
        for batch in _passes(batches, listener.passes):
            with listener.batch(batch):
                run(model, batch)
            bar.update(listener.rows)
            seen += 1
    if not seen:
        raise EmptyStreamError(
            "expected at least one batch, got none; "
            "check that the loader is neither empty nor used up"
        )
    projectors = listener.finish()
    _report(projectors, on_missing)
    return projectors


def _passes(batches: Iterable[Any], passes: int) -> Iterable[Any]:
    if passes > 1 and hasattr(batches, "__next__"):
        raise StreamError(
            f"expected batches that can be read {passes} times, as the learner asks for, got a "
            f"one-shot {type(batches).__name__}; pass a list or a DataLoader"
        )
    for _ in range(passes):
        yield from batches


def _bar(progress: bool) -> tqdm[Any]:
    # None: only where someone is looking.
    return tqdm(desc="learning", unit=" rows", unit_scale=True, disable=None if progress else True)


def _report(projectors: Projectors, on_missing: OnMissing) -> None:
    missing = projectors.missing
    if not missing or (on_missing == "ignore" and len(projectors)):
        return
    listed = "; ".join(f"{name!r}: {reason}" for name, reason in missing.items())
    message = (
        f"expected every layer to run, got {len(missing)} without a projector ({listed}); "
        "leave them out of the targets, or feed batches that reach them"
    )
    if on_missing == "raise" or not len(projectors):
        raise LayerError(message)
    warnings.warn(message, stacklevel=3)
