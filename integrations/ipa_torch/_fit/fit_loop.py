"""Run of a fit: passes over the batches within budgets of memory, rows and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ipa_core.caller_warnings import warn_caller
from ipa_core.errors import EmptyStreamError, StreamError
from ipa_core.io.streams import is_one_shot
from ipa_core.settings import boolean
from ipa_torch._capture.eval_mode import eval_mode
from ipa_torch._capture.forward import Forward, check_batches, resolve_forward
from ipa_torch._capture.row_weights import RowWeights
from ipa_torch._distributed.process_group import FitProcessGroup, ProcessGroupArg
from ipa_torch._fit.attention_head_learners import LayerLearner
from ipa_torch._fit.checkpoint import CheckpointConfig, CheckpointLike, CheckpointWriter
from ipa_torch._fit.code_digest import code_digest
from ipa_torch._fit.collector import ActivationCollector, Source
from ipa_torch._fit.early_stopping import DATA_EXHAUSTED, NO_BATCH, StoppingCriteria
from ipa_torch._fit.fit_plan import FitPlan
from ipa_torch._fit.folder_lock import lock_folder
from ipa_torch._fit.memory_passes import MemoryPass, join_passes
from ipa_torch._fit.merge_results import PROJECTORS, ResultKind, merge_results
from ipa_torch._layer_rank import resolve_rank
from ipa_torch._layers.adapter_support import check_supported
from ipa_torch._layers.targets import Targets, select_layers
from ipa_torch._layers.unwrap import unwrap_model
from ipa_torch._settings import resolve_max_patches
from ipa_torch.layer_projectors import M


def run_fit(
    model: nn.Module,
    batches: Iterable[Any],
    rank: int | Mapping[str, int],
    result: ResultKind[M],
    *,
    targets: Targets,
    learner: Callable[[int], LayerLearner],
    row_weights: RowWeights | None,
    forward: Forward | None,
    max_patches: int | None,
    stop: StoppingCriteria | None,
    max_bytes: int | None,
    process_group: ProcessGroupArg,
    checkpoint: CheckpointLike | None,
    progress: bool,
    source: Source = "inputs",
    settings: Mapping[str, Any] | None = None,
) -> M:
    """Run the model on the batches and return the results of its layers' learners.

    The parameters are those of `fit_projectors`, and further ``settings`` that a checkpoint must
    have.
    """
    model = unwrap_model(model)
    layers = select_layers(model, targets)
    if result is PROJECTORS:  # asked before hours of learning
        for name, layer in layers.items():
            check_supported(name, layer)
    check_batches(batches)
    max_patches, stop = resolve_max_patches(max_patches), StoppingCriteria.of(stop)
    plan = FitPlan(
        model=model,
        layers=layers,
        ranks={name: resolve_rank(name, rank) for name in layers},
        batches=batches,
        learner=learner,
        run=resolve_forward(forward),
        row_weights=row_weights,
        max_patches=max_patches,
        stop=stop,
        source=source,
        settings={
            "tolerance": stop.tolerance,
            "max_patches": max_patches,
            "row_weights": code_digest(row_weights),
            "forward": code_digest(forward),
            **(settings or {}),
        },
    )
    return _learn(plan, result, max_bytes, process_group, checkpoint, progress)


def _learn(
    plan: FitPlan,
    result: ResultKind[M],
    max_bytes: int | None,
    process_group: ProcessGroupArg,
    checkpoint: CheckpointLike | None,
    progress: bool,
) -> M:
    """Return the results of as many passes as the memory needs."""
    learned: list[M] = []
    with FitProcessGroup(process_group) as fit_group:
        memory_passes = plan.memory_passes(max_bytes)
        for number, memory_pass in enumerate(memory_passes):
            fit_group.begin(plan.model)
            config = None
            if checkpoint is not None:
                config = CheckpointConfig.of(checkpoint).of_process(fit_group.folder)
                config = config.of_memory_pass(number, len(memory_passes))
            make_bar = partial(_bar, progress, memory_passes, number)
            learned.append(
                _learn_pass(plan, memory_pass, result, fit_group, config, make_bar, bool(learned))
            )
            if fit_group.interrupted:
                break
    return join_passes(learned, plan.layers, result.kind)


def _learn_pass(
    plan: FitPlan,
    memory_pass: MemoryPass,
    result: ResultKind[M],
    fit_group: FitProcessGroup,
    config: CheckpointConfig | None,
    make_bar: Callable[[], tqdm[Any]],
    others_learned: bool,
) -> M:
    """Return the results of a memory pass, from the rows of all ranks."""
    collector = plan.collector(memory_pass)
    position = plan.position(memory_pass, resumable=config is not None)
    checkpoints = CheckpointWriter(config, collector, position, fit_group.all_reduce_min)
    lock = nullcontext() if config is None else lock_folder(Path(config.folder))
    interrupted = False
    with lock, eval_mode(plan.model), collector, make_bar() as bar:
        try:
            reason = _run_pass(plan, collector, bar, checkpoints, fit_group)
        except (Exception, KeyboardInterrupt) as error:
            peers = fit_group.group is not None and isinstance(error, Exception)
            if plan.stop.on_error == "raise" or not (
                others_learned or collector.has_samples or peers
            ):
                raise
            interrupted = True
            reason = f"interrupted by {type(error).__name__}: {error}"
            warn_caller(f"learning ended early, {reason}")
    returning = plan.stop.on_error == "return"
    layers, seen = memory_pass.layers, position.seen
    return merge_results(fit_group, collector, layers, reason, seen, interrupted, returning, result)


def _run_pass(
    plan: FitPlan,
    collector: ActivationCollector[LayerLearner],
    bar: tqdm[Any],
    checkpoints: CheckpointWriter,
    fit_group: FitProcessGroup,
) -> str:
    """Run until a stopping criterion holds; return which."""
    start, position = time.monotonic(), checkpoints.position
    remaining = fit_group.lockstep(checkpoints.skip_seen(_repeated(plan.batches, collector.passes)))
    while (reason := _stop_reason(collector, plan.stop, position.seen, start)) is None:
        try:
            batch = next(remaining)
        except StopIteration:
            break
        with position.first_batch(), collector.batch(batch):
            plan.run(plan.model, batch)
        bar.update(collector.rows)
        checkpoints.record_batch(batch)
    checkpoints.write_last()
    if not position.seen and fit_group.group is None:
        raise EmptyStreamError(NO_BATCH)
    return reason or DATA_EXHAUSTED


def _stop_reason(
    collector: ActivationCollector[LayerLearner], stop: StoppingCriteria, seen: int, start: float
) -> str | None:
    """Return the reason to stop after so many batches, or None."""
    if collector.done:
        return DATA_EXHAUSTED
    return stop.exhausted_budget(seen, time.monotonic() - start) if seen else None


def _repeated(batches: Iterable[Any], passes: int) -> Iterable[Any]:
    """Return the batches as often as the learners read them."""
    if passes > 1 and is_one_shot(batches):
        raise StreamError(
            f"expected batches that can be read {passes} times, as the learner asks for, got a "
            f"one-shot {type(batches).__name__}; pass a list or a DataLoader"
        )
    # Not a generator function: ending early, it would close the caller's generator.
    return chain.from_iterable(batches for _ in range(passes))


def _bar(progress: bool, memory_passes: Sequence[MemoryPass], number: int) -> tqdm[Any]:
    description = "learning"
    if memory_passes[number].bytes:
        sizes = [memory_pass.bytes / 1e6 for memory_pass in memory_passes]
        description = (
            f"learning, pass {number + 1} of {len(sizes)}, "
            f"{sizes[number]:,.0f} of {sum(sizes):,.0f} MB"
        )
    # disable=None: tqdm shows the bar on a terminal only.
    disable = None if boolean("progress", progress) else True
    return tqdm(desc=description, unit=" rows", unit_scale=True, disable=disable)
