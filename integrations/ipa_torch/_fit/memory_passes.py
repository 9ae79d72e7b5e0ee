"""Memory passes: layers whose learners fit a budget of bytes, and the results of all passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ipa_core.errors import SettingError
from ipa_torch._capture.forward import Forward
from ipa_torch._fit.attention_head_learners import LayerLearner
from ipa_torch._fit.collector import Source
from ipa_torch._fit.learner_bytes import bytes_by_input
from ipa_torch._settings import check_positive
from ipa_torch.layer_projectors import M

#: Reason why a layer of a later memory pass has no result after an interruption.
ENDED_BEFORE = "learning ended before its pass"


@dataclass(frozen=True)
class MemoryPass:
    """Layers that are fitted in the same pass, and the bytes of their learners."""

    layers: Mapping[str, nn.Module]
    bytes: int


def split_by_memory(
    max_bytes: int,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    make_learner: Callable[[int], LayerLearner],
    batch: Any,
    run: Forward,
    *,
    converging: bool,
    source: Source,
) -> list[MemoryPass]:
    """Split layers, in order, into as few memory passes as keep learners within the budget.

    Layers that share the inputs of this batch are in the same pass and count once; a layer that it
    does not reach counts by its weight.

    Raises
    ------
    SettingError
        If a single learner is larger.
    """
    check_positive("max_bytes", max_bytes)
    memory_passes: list[MemoryPass] = []
    sizes = bytes_by_input(
        model, layers, ranks, make_learner, batch, run, converging=converging, source=source
    )
    for names, size in sizes.items():
        group = {name: layers[name] for name in names}
        if size > max_bytes:
            raise SettingError(
                f"layer {names[0]!r}: expected max_bytes of at least {size:,}, the size of its "
                f"learner, got {max_bytes:,}; allow more, or use a smaller rank"
            )
        if memory_passes and memory_passes[-1].bytes + size <= max_bytes:
            memory_passes[-1] = MemoryPass(
                {**memory_passes[-1].layers, **group}, memory_passes[-1].bytes + size
            )
        else:
            memory_passes.append(MemoryPass(group, size))
    return memory_passes


def join_passes(passes: Sequence[M], layers: Iterable[str], kind: type[M]) -> M:
    """Return the results of all memory passes, in the order of ``layers``."""
    learned: dict[str, Any] = {}
    missing: dict[str, str] = {}
    stopped: dict[str, str] = {}
    for memory_pass in passes:
        learned.update(memory_pass)
        missing.update(memory_pass.missing)
        stopped.update(memory_pass.stopped)
    ordered = {name: learned[name] for name in layers if name in learned}
    unreached = {name: ENDED_BEFORE for name in layers if name not in learned | missing}
    return kind(ordered, missing=missing | unreached, stopped=stopped, passes=len(passes))
