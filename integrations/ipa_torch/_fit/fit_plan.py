"""Plan of a fit: its resolved settings, which all passes over the batches share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ipa_core.errors import EmptyStreamError, StreamError
from ipa_core.io.streams import is_one_shot
from ipa_torch._capture.activation_rows import ActivationRows
from ipa_torch._capture.forward import Forward
from ipa_torch._capture.row_weights import RowWeights
from ipa_torch._fit.attention_head_learners import LayerLearner
from ipa_torch._fit.collector import ActivationCollector, Source
from ipa_torch._fit.convergence import Convergence
from ipa_torch._fit.early_stopping import NO_BATCH, StoppingCriteria
from ipa_torch._fit.memory_passes import MemoryPass, split_by_memory
from ipa_torch._fit.resumable_pass import ResumablePass
from ipa_torch._fit.shared_inputs import SharedInputTree
from ipa_torch._fit.weight_digests import WeightDigests
from ipa_torch._layers.random_state import kept_random_state


@dataclass(frozen=True)
class FitPlan:
    """Model, layers, batches and resolved settings of a fit.

    ``settings`` are those that a checkpoint must have been written with, beside the ranks.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    ranks: Mapping[str, int]
    batches: Iterable[Any]
    learner: Callable[[int], LayerLearner]
    run: Forward
    row_weights: RowWeights | None
    max_patches: int | None
    stop: StoppingCriteria
    source: Source
    settings: Mapping[str, Any]

    def memory_passes(self, max_bytes: int | None) -> list[MemoryPass]:
        """Return the layers that are fitted at a time."""
        if max_bytes is None:
            return [MemoryPass(self.layers, 0)]
        return split_by_memory(
            max_bytes,
            self.model,
            self.layers,
            self.ranks,
            self.learner,
            _first(self.batches),
            self.run,
            converging=self.stop.tolerance is not None,
            source=self.source,
        )

    def collector(self, memory_pass: MemoryPass) -> ActivationCollector[LayerLearner]:
        """Return the collector of the activations of a pass."""
        tolerance = self.stop.tolerance
        convergence = None if tolerance is None else Convergence(tolerance)
        return ActivationCollector(
            memory_pass.layers,
            SharedInputTree(self._ranks_of(memory_pass), self.learner, convergence),
            ActivationRows(self.model, self.row_weights, self.max_patches),
            max_rows=self.stop.max_rows,
            drop_failed=self.stop.on_error == "return",
            source=self.source,
        )

    def position(self, memory_pass: MemoryPass, *, resumable: bool) -> ResumablePass:
        """Return the position in a pass; only one that is resumable needs the weights' digests."""
        weights = WeightDigests(self.model, self.layers.values()) if resumable else None
        return ResumablePass({"ranks": self._ranks_of(memory_pass), **self.settings}, weights)

    def _ranks_of(self, memory_pass: MemoryPass) -> dict[str, int]:
        return {name: self.ranks[name] for name in memory_pass.layers}


def _first(batches: Iterable[Any]) -> Any:
    if is_one_shot(batches):
        raise StreamError(
            "expected batches that can be read several times, as a memory budget may need, got "
            f"a one-shot {type(batches).__name__}; pass a list or a DataLoader"
        )
    with kept_random_state():  # keeps the shuffling of the passes
        for batch in batches:
            return batch
    raise EmptyStreamError(NO_BATCH)
