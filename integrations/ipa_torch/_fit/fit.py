"""The one call: from a model and its data to projectors of its layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from tqdm.auto import tqdm

from ipa_core import Learner, RandomizedSVD
from ipa_core.errors import EmptyStreamError, StreamError
from ipa_torch._capture.eval_mode import eval_mode
from ipa_torch._capture.forward import Forward, default_forward
from ipa_torch._capture.row_weights import RowWeighter, RowWeights, attention_mask
from ipa_torch._distributed.process_group import FitProcessGroup, ProcessGroupArg
from ipa_torch._fit.checkpoint import CheckpointConfig, CheckpointLike, CheckpointWriter
from ipa_torch._fit.collector import ActivationCollector
from ipa_torch._fit.early_stopping import ENDED, Budget, Convergence
from ipa_torch._fit.memory import MemoryPass, split_by_memory
from ipa_torch._fit.merge_results import merge_results
from ipa_torch._fit.shared_inputs import SharedInputTree
from ipa_torch._layers.targets import ALL_LINEAR, Targets, select_layers
from ipa_torch._layers.unwrap import unwrap_model
from ipa_torch.errors import LayerError, check_choice
from ipa_torch.projectors import LayerProjectors, join_passes, resolve_rank

OnMissing: TypeAlias = Literal["warn", "raise", "ignore"]
OnError: TypeAlias = Literal["raise", "return"]

_NO_BATCH = (
    "expected at least one batch, got none; check that the loader is neither empty nor used up"
)


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
    max_rows: int | None = None,
    max_batches: int | None = None,
    max_seconds: float | None = None,
    tolerance: float | None = None,
    max_bytes: int | None = None,
    process_group: ProcessGroupArg = "world",
    checkpoint: CheckpointLike | None = None,
    on_missing: OnMissing = "warn",
    on_error: OnError = "raise",
    progress: bool = True,
) -> LayerProjectors:
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
    max_rows, max_batches, max_seconds : optional
        Budgets: of rows for each layer, of batches and of seconds. What has begun is finished: they
        are looked at after each batch.
    tolerance : float, optional
        A layer stops when the excess of its reconstruction error over the best possible one is
        estimated to be at most this, on rows not yet absorbed; 1e-2, say, for one per cent. Not
        before 12 batches. When all have stopped, no more batches are run. `LayerProjectors.stopped`
        says why each layer did. By default all batches are used.
    max_bytes : int, optional
        Budget of memory for learners. Layers whose learners do not fit together are learned in
        turns, each with a pass of its own over the batches, with the same result; other budgets
        hold for each pass. `LayerProjectors.passes` says how many there were. Counted is what
        learners hold while a batch is read, not the passing workspace of the one that is learning.
    process_group : "world", torch.distributed.ProcessGroup or None, default "world"
        Where `torch.distributed` is initialised, each process learns from its own batches, however
        many, and all get the same projectors, of everybody's rows: all must make the call. "world":
        all processes; a group: its members; None: this process alone. Budgets and ``tolerance``
        hold in each process.
    checkpoint : path-like or CheckpointConfig, optional
        A folder in which to write down every five minutes (or as `CheckpointConfig` says) where
        learning stands, and at its end. If one is there, learning goes on from it: the batches it has seen
        are drawn, held against it and not run, and the result is that of an uninterrupted run.
    on_missing : {"warn", "raise", "ignore"}, default "warn"
        What to do about layers whose forward never ran; the others are returned.
    on_error : {"raise", "return"}, default "raise"
        What to do on an exception in a forward pass, or Ctrl-C: raise it, or warn and return what
        was learned so far. A layer with an unfit input (NaN) is then left out and the others go on.
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
        (``on_missing="raise"``, or when none ran); or if, on a GPU, one changes its input in place.
    EmptyStreamError
        If there is no batch.
    StreamError
        If several passes may be needed and the batches can be read only once, or the batches are
        others than those a checkpoint has seen.
    PeerError
        If another process failed; the message says with what.
    FileFormatError, SettingError
        If a checkpoint is damaged, or of a run with other settings.
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
    >>> list(fit_projectors(model, batches, rank=2, progress=False))
    ['0', '2']
    """
    check_choice("on_missing", on_missing, OnMissing)
    check_choice("on_error", on_error, OnError)
    convergence = None if tolerance is None else Convergence(tolerance)
    model = unwrap_model(model)
    layers = select_layers(model, targets)
    ranks = {name: resolve_rank(name, rank) for name in layers}
    run = default_forward if forward is None else forward
    with FitProcessGroup(process_group) as fit_group:
        memory_passes = [MemoryPass(layers, 0)]
        if max_bytes is not None:
            batch = _first(batches)
            memory_passes = split_by_memory(
                max_bytes,
                model,
                layers,
                ranks,
                learner,
                batch,
                run,
                converging=tolerance is not None,
            )
        learned: list[LayerProjectors] = []
        for memory_pass in memory_passes:
            own = {name: ranks[name] for name in memory_pass.layers}
            settings = {"ranks": own, "tolerance": tolerance, "max_patches": max_patches}
            budget = Budget(max_rows, max_batches, max_seconds)
            collector = ActivationCollector(
                memory_pass.layers,
                SharedInputTree(own, learner, convergence),
                RowWeighter(model, row_weights),
                max_patches=max_patches,
                max_rows=max_rows,
                keep_going=on_error == "return",
            )
            fit_group.begin(model)
            where = _own(checkpoint, fit_group, memory_passes, memory_pass)
            checkpoints = CheckpointWriter(where, collector, settings, fit_group.all_reduce_min)
            interrupted = False
            with eval_mode(model), collector, _bar(progress, memory_passes, len(learned)) as bar:
                try:
                    reason = _listen(
                        model, batches, run, collector, budget, bar, checkpoints, fit_group
                    )
                except (Exception, KeyboardInterrupt) as error:
                    if on_error == "raise" or not (learned or collector.has_samples):
                        raise
                    interrupted = True
                    reason = f"interrupted by {type(error).__name__}: {error}"
                    warnings.warn(f"learning ended early, {reason}", stacklevel=2)
            learned.append(
                merge_results(
                    fit_group, collector, memory_pass.layers, reason, checkpoints.seen, interrupted
                )
            )
            if fit_group.interrupted:
                break
    projectors = join_passes(learned, layers)
    report(projectors, on_missing)
    return projectors


def _listen(
    model: nn.Module,
    batches: Iterable[Any],
    run: Forward,
    collector: ActivationCollector,
    budget: Budget,
    bar: tqdm[Any],
    checkpoints: CheckpointWriter,
    fit_group: FitProcessGroup,
) -> str:
    """Run the model on the batches until one reason or another to stop; return it."""
    left = fit_group.lockstep(checkpoints.skip_seen(_passes(batches, collector.passes)))
    while (reason := _enough(collector, budget, checkpoints.seen)) is None:
        try:
            batch = next(left)
        except StopIteration:
            break
        with collector.batch(batch):
            run(model, batch)
        bar.update(collector.rows)
        checkpoints.record_batch(batch)
    checkpoints.write()
    if not checkpoints.seen and fit_group.group is None:
        raise EmptyStreamError(_NO_BATCH)
    return reason or ENDED


def _enough(collector: ActivationCollector, budget: Budget, seen: int) -> str | None:
    """Return why learning ends after so many batches, if it does."""
    if collector.done:
        return ENDED
    return budget.spent(seen) if seen else None


def _own(
    checkpoint: CheckpointLike | None,
    fit_group: FitProcessGroup,
    memory_passes: Sequence[MemoryPass],
    memory_pass: MemoryPass,
) -> CheckpointConfig | None:
    """Return where this process writes down where this turn stands."""
    if checkpoint is None:
        return None
    own = CheckpointConfig.of(checkpoint).of_process(fit_group.folder)
    return (
        own
        if len(memory_passes) == 1
        else own.under(f"pass-{memory_passes.index(memory_pass) + 1}-of-{len(memory_passes)}")
    )


def _passes(batches: Iterable[Any], passes: int) -> Iterable[Any]:
    if passes > 1 and hasattr(batches, "__next__"):
        raise StreamError(
            f"expected batches that can be read {passes} times, as the learner asks for, got a "
            f"one-shot {type(batches).__name__}; pass a list or a DataLoader"
        )
    # No generator of our own: ending early, it would close the caller's.
    return chain.from_iterable(repeat(batches, passes))


def _first(batches: Iterable[Any]) -> Any:
    if hasattr(batches, "__next__"):
        raise StreamError(
            "expected batches that can be read several times, as a budget of memory may need, got "
            f"a one-shot {type(batches).__name__}; pass a list or a DataLoader"
        )
    with torch.random.fork_rng([]):  # the passes shuffle as if nothing had been read
        for batch in batches:
            return batch
    raise EmptyStreamError(_NO_BATCH)


def _bar(progress: bool, memory_passes: Sequence[MemoryPass], done: int) -> tqdm[Any]:
    what = "learning"
    if memory_passes[done].bytes:
        now, most = (
            f"{size / 1e6:,.0f}" for size in (memory_passes[done].bytes, _total(memory_passes))
        )
        what = f"learning, pass {done + 1} of {len(memory_passes)}, {now} of {most} MB"
    # None: only where someone is looking.
    return tqdm(desc=what, unit=" rows", unit_scale=True, disable=None if progress else True)


def _total(memory_passes: Sequence[MemoryPass]) -> int:
    return sum(memory_pass.bytes for memory_pass in memory_passes)


def report(projectors: LayerProjectors, on_missing: OnMissing) -> None:
    """Say which layers were asked for and not learned, and why.

    Raises
    ------
    LayerError
        If one was not and ``on_missing`` is "raise", or if none was learned.
    """
    missing = projectors.missing
    if not missing or (on_missing == "ignore" and len(projectors)):
        return
    by_reason: dict[str, list[str]] = {}
    for name, reason in missing.items():
        by_reason.setdefault(reason, []).append(name)
    listed = "; ".join(f"{_some(names)}: {reason}" for reason, names in by_reason.items())
    message = (
        f"expected a projector for every layer, got none for {len(missing)} ({listed}); "
        "leave them out of the targets, or feed batches that reach them"
    )
    if on_missing == "raise" or not len(projectors):
        raise LayerError(message)
    warnings.warn(message, stacklevel=3)


def _some(names: Sequence[str], limit: int = 3) -> str:
    """Return the first of many names: a model may lack dozens for one reason."""
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
