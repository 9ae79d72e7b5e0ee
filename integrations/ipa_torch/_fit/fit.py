"""Fit of projectors to the input activations of a model's layers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ipa_core import Learner, RandomizedSVD
from ipa_core.errors import EmptyStreamError, StreamError
from ipa_core.io.streams import is_one_shot
from ipa_torch._capture.eval_mode import eval_mode
from ipa_torch._capture.forward import Forward, default_forward
from ipa_torch._capture.row_weights import RowWeighter, RowWeights, attention_mask
from ipa_torch._distributed.process_group import FitProcessGroup, ProcessGroupArg
from ipa_torch._fit.checkpoint import CheckpointConfig, CheckpointLike, CheckpointWriter
from ipa_torch._fit.collector import ActivationCollector
from ipa_torch._fit.early_stopping import DATA_EXHAUSTED, Convergence, StoppingCriteria
from ipa_torch._fit.memory import MemoryPass, split_by_memory
from ipa_torch._fit.merge_results import merge_results
from ipa_torch._fit.missing_layers import OnMissing, report_missing
from ipa_torch._fit.shared_inputs import SharedInputTree
from ipa_torch._layers.targets import ALL_LINEAR, Targets, select_layers
from ipa_torch._layers.unwrap import unwrap_model
from ipa_torch.errors import check_choice
from ipa_torch.projectors import LayerProjectors, join_passes, resolve_rank

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
        whose leading axes have this shape, or its product; all rows of others count. None: every
        row counts.
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
        (``on_missing="raise"``, or when none ran); or if, on a GPU, a layer changes its input in
        place.
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
    model = unwrap_model(model)
    layers = select_layers(model, targets)
    ranks = {name: resolve_rank(name, rank) for name in layers}
    run = default_forward if forward is None else forward
    stop = StoppingCriteria() if stop is None else stop
    convergence = None if stop.tolerance is None else Convergence(stop.tolerance)
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
                converging=convergence is not None,
            )
        learned: list[LayerProjectors] = []
        for number, memory_pass in enumerate(memory_passes):
            pass_ranks = {name: ranks[name] for name in memory_pass.layers}
            settings = {
                "ranks": pass_ranks,
                "tolerance": stop.tolerance,
                "max_patches": max_patches,
            }
            collector = ActivationCollector(
                memory_pass.layers,
                SharedInputTree(pass_ranks, learner, convergence),
                RowWeighter(model, row_weights),
                max_patches=max_patches,
                max_rows=stop.max_rows,
                drop_failed=stop.on_error == "return",
            )
            fit_group.begin(model)
            config = _checkpoint_of_pass(checkpoint, fit_group, number, len(memory_passes))
            checkpoints = CheckpointWriter(config, collector, settings, fit_group.all_reduce_min)
            interrupted = False
            with eval_mode(model), collector, _bar(progress, memory_passes, number) as bar:
                try:
                    reason = _run_pass(
                        model, batches, run, collector, stop, bar, checkpoints, fit_group
                    )
                except (Exception, KeyboardInterrupt) as error:
                    if stop.on_error == "raise" or not (learned or collector.has_samples):
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
    report_missing(projectors, on_missing)
    return projectors


def _run_pass(
    model: nn.Module,
    batches: Iterable[Any],
    run: Forward,
    collector: ActivationCollector,
    stop: StoppingCriteria,
    bar: tqdm[Any],
    checkpoints: CheckpointWriter,
    fit_group: FitProcessGroup,
) -> str:
    """Run until a stopping criterion holds; return which."""
    start = time.monotonic()
    remaining = fit_group.lockstep(checkpoints.skip_seen(_repeated(batches, collector.passes)))
    while (reason := _stop_reason(collector, stop, checkpoints.seen, start)) is None:
        try:
            batch = next(remaining)
        except StopIteration:
            break
        with collector.batch(batch):
            run(model, batch)
        bar.update(collector.rows)
        checkpoints.record_batch(batch)
    checkpoints.write()
    if not checkpoints.seen and fit_group.group is None:
        raise EmptyStreamError(_NO_BATCH)
    return reason or DATA_EXHAUSTED


def _stop_reason(
    collector: ActivationCollector, stop: StoppingCriteria, seen: int, start: float
) -> str | None:
    """Return the reason to stop after so many batches, or None."""
    if collector.done:
        return DATA_EXHAUSTED
    return stop.exhausted_budget(seen, time.monotonic() - start) if seen else None


def _checkpoint_of_pass(
    checkpoint: CheckpointLike | None, fit_group: FitProcessGroup, number: int, passes: int
) -> CheckpointConfig | None:
    """Return the checkpoints of this rank and of this memory pass."""
    if checkpoint is None:
        return None
    config = CheckpointConfig.of(checkpoint).of_process(fit_group.folder)
    return config if passes == 1 else config.under(f"pass-{number + 1}-of-{passes}")


def _repeated(batches: Iterable[Any], passes: int) -> Iterable[Any]:
    """Return the batches as often as the learners read them."""
    if passes > 1 and is_one_shot(batches):
        raise StreamError(
            f"expected batches that can be read {passes} times, as the learner asks for, got a "
            f"one-shot {type(batches).__name__}; pass a list or a DataLoader"
        )
    # Not a generator function: ending early, it would close the caller's generator.
    return chain.from_iterable(repeat(batches, passes))


def _first(batches: Iterable[Any]) -> Any:
    if is_one_shot(batches):
        raise StreamError(
            "expected batches that can be read several times, as a memory budget may need, got "
            f"a one-shot {type(batches).__name__}; pass a list or a DataLoader"
        )
    with torch.random.fork_rng([]):  # keeps the shuffling of the passes
        for batch in batches:
            return batch
    raise EmptyStreamError(_NO_BATCH)


def _bar(progress: bool, memory_passes: Sequence[MemoryPass], number: int) -> tqdm[Any]:
    description = "learning"
    if memory_passes[number].bytes:
        sizes = [memory_pass.bytes / 1e6 for memory_pass in memory_passes]
        description = (
            f"learning, pass {number + 1} of {len(sizes)}, "
            f"{sizes[number]:,.0f} of {sum(sizes):,.0f} MB"
        )
    # disable=None: tqdm shows the bar on a terminal only.
    disable = None if progress else True
    return tqdm(desc=description, unit=" rows", unit_scale=True, disable=disable)
