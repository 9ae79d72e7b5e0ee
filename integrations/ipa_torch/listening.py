"""Hooks that hand the inputs of layers to learners."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from ipa_core import Learner, Projector
from ipa_core.errors import IPAError, with_context
from ipa_torch.bypass import WeightWatch
from ipa_torch.identity import Identities
from ipa_torch.inputs import input_of
from ipa_torch.projectors import Projectors
from ipa_torch.reading import Reading, Rows, reading_of
from ipa_torch.sharing import Histories
from ipa_torch.weighting import RowFilter

NEVER_RAN = "its forward never ran"
BYPASSED = "its weight is used without calling it, which no hook and no adapter can see"
NO_ROWS = "it saw no row of positive weight"


class Listener:
    """Listens to layers between ``__enter__`` and ``__exit__``, and learns."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        ranks: Mapping[str, int],
        learner: Callable[[int], Learner],
        row_filter: RowFilter,
        max_patches: int | None,
    ) -> None:
        self._layers = layers
        self._readings = {name: _reading(name, module) for name, module in layers.items()}
        self._max_patches = max_patches
        self._filter = row_filter
        self._histories = Histories(ranks, learner)
        self._identities = Identities()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._ran: set[str] = set()
        self._watch = WeightWatch(layers)
        self.rows = 0

    @property
    def passes(self) -> int:
        """How often the learners want to read the batches."""
        return max(node.learner.passes for node in self._histories.at.values())

    def __enter__(self) -> Self:
        self._handles += self._filter.watch()
        for name, module in self._layers.items():
            hook = partial(self._hear, name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def batch(self, batch: Any) -> Iterator[None]:
        """Enclose the forward pass of one batch."""
        weighted = self._filter.start(batch)
        self.rows = 0
        watch = nullcontext() if len(self._ran) == len(self._layers) else self._watch
        try:
            with watch:
                yield
        finally:
            self._histories.end_batch()
            self._identities.clear()
        if weighted is not None:
            self.rows = weighted

    def finish(self) -> Projectors:
        """Return what was learned; layers on one history get one projector."""
        made: dict[int, Projector] = {}
        learned, missing = {}, {}
        for name, node in self._histories.at.items():
            if name not in self._ran:
                missing[name] = BYPASSED if name in self._watch.used else NEVER_RAN
            elif node.learner.samples == 0:
                missing[name] = NO_ROWS
            else:
                if id(node) not in made:
                    made[id(node)] = self._finalized(name, node.learner)
                learned[name] = made[id(node)]
        return Projectors(learned, missing=missing)

    def _finalized(self, name: str, learner: Learner) -> Projector:
        try:
            return learner.finalize()
        except IPAError as error:
            raise with_context(error, f"layer {name!r}") from error

    def _hear(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        try:
            activation = input_of(module, args, kwargs)
            reading = self._readings[name]
            event = self._identities.number(activation), reading
            self._ran.add(name)
            # Learning stays out of the model's autocast: products in half lose the small core.
            with torch.no_grad(), torch.autocast(activation.device.type, enabled=False):
                self._histories.see(name, event, partial(self._rows, activation, reading))
        except IPAError as error:
            raise with_context(error, f"layer {name!r}") from error

    def _rows(self, activation: torch.Tensor, reading: Reading) -> Rows:
        chosen = self._filter(activation, reading.leading(activation))
        rows, weights = reading.rows(activation.detach(), chosen, self._max_patches)
        if not self.rows:
            self.rows = int(rows.shape[0])
        return rows, weights


def _reading(name: str, module: nn.Module) -> Reading:
    try:
        return reading_of(module)
    except IPAError as error:
        raise with_context(error, f"layer {name!r}") from error
