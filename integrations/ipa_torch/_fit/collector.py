"""Collector of activations: forward hooks that update learners."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, Self, TypeAlias

import torch
from torch import nn

from ipa_core.errors import IPAError
from ipa_torch._capture.activation_rows import ActivationRows
from ipa_torch._capture.async_update import lasting_rows
from ipa_torch._capture.bypass_detection import WeightUseTracer
from ipa_torch._capture.hooks import Hook, HookSet
from ipa_torch._capture.row_consumer import RowConsumer
from ipa_torch._fit.shared_inputs import C, InputPrefix, SharedInputTree
from ipa_torch._layers.activation_tensor import (
    check_tensors,
    check_unsharded,
    input_of,
    output_of,
)
from ipa_torch._layers.execution_device import check_loaded
from ipa_torch._layers.matmul_view import view_of
from ipa_torch._layers.output_view import output_view
from ipa_torch._layers.row_view import RowView
from ipa_torch.errors import named_layer
from ipa_torch.layer_projectors import M, T

Source: TypeAlias = Literal["inputs", "outputs"]

NEVER_RAN = "its forward never ran"
OTHER_THREADS = "its forward ran in other threads only, whose passes are not learned"
BYPASSED = "its weight is used without calling it, which no hook and no adapter can see"
NO_ROWS = "it saw no row of positive weight"


@dataclass(frozen=True)
class CollectorState(Generic[C]):
    """State of a collector between batches.

    Parameters
    ----------
    node_of : mapping of str to InputPrefix
        Node of each layer in the tree of inputs; layers with the same inputs share a node.
    ran : mapping of str to torch.device
        Layers whose forward ran, with the device.
    stopped, failed : mapping of str to str
        Layers that are no longer updated, by a stopping criterion or an error, with the reason.
    bypassed : frozenset of str
        Layers whose weight was passed to a function other than their forward.
    """

    node_of: Mapping[str, InputPrefix[C]]
    ran: Mapping[str, torch.device]
    stopped: Mapping[str, str]
    failed: Mapping[str, str]
    bypassed: frozenset[str]

    def missing(self, name: str) -> str | None:
        """Return the reason why a layer has no projector, or None if it has."""
        if name in self.failed:
            return self.failed[name]
        if name not in self.ran:
            return BYPASSED if name in self.bypassed else NEVER_RAN
        return None if self.node_of[name].learner.samples else NO_ROWS

    def groups(self) -> list[tuple[InputPrefix[C], list[str]]]:
        """Return each node with its layers, in the model's order."""
        nodes: dict[int, tuple[InputPrefix[C], list[str]]] = {}
        for name, node in self.node_of.items():
            nodes.setdefault(id(node), (node, []))[1].append(name)
        return list(nodes.values())


class ActivationCollector(Generic[C]):
    """Hooks on layers, between ``__enter__`` and ``__exit__``, that update learners.

    A layer's update begins before its forward. On a CPU it is finished at once, on other devices
    while they compute later layers, at the latest when the batch ends.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        inputs: SharedInputTree[C],
        reader: ActivationRows,
        *,
        max_rows: int | None,
        drop_failed: bool,
        source: Source = "inputs",
    ) -> None:
        check_loaded(layers)
        self._layers = layers
        self._views = {name: _view(name, module, source) for name, module in layers.items()}
        self._inputs = inputs
        self._reader = reader
        self._max_rows = max_rows
        self._drop_failed = drop_failed
        self._hooks = HookSet([*reader.hooks, *self._layer_hooks(source)])
        self._weight_use = WeightUseTracer(layers)
        self._ran: dict[str, torch.device] = {}
        self._stopped: dict[str, str] = {}
        self._failed: dict[str, str] = {}
        self.rows = 0

    @property
    def passes(self) -> int:
        """Largest number of passes over the batches of any learner."""
        return max(node.learner.passes for node in self._inputs.node_of.values())

    @property
    def done(self) -> bool:
        """True if all layers that ran have stopped."""
        return bool(self._ran) and self._ran.keys() <= {*self._stopped, *self._failed}

    @property
    def has_samples(self) -> bool:
        """True if any learner has samples."""
        return any(node.learner.samples for node in self._inputs.node_of.values())

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()
        self._reader.close()

    @contextmanager
    def batch(self, batch: Any) -> Iterator[None]:
        """Enclose the forward pass of a batch."""
        weighted = self._reader.start(batch)
        self.rows = 0
        watch = nullcontext() if len(self._ran) == len(self._layers) else self._weight_use
        try:
            with watch:
                yield
            self._finish_updates()
        except BaseException:
            if self._drop_failed:  # otherwise an error of a later layer would take its place
                self._finish_updates()
            raise
        finally:
            self._inputs.end_batch()
        self._reader.end_batch()
        if weighted is not None:
            self.rows = weighted
        self._stop_layers()

    def finish(self, reason: str, result: Callable[[C], T], kind: type[M]) -> M:
        """Return the results of the learners; layers at the same node share a result."""
        results: dict[int, T] = {}
        learned, missing = {}, {}
        snapshot = self.snapshot()
        for name, node in snapshot.node_of.items():
            if (why := snapshot.missing(name)) is not None:
                elsewhere = why == NEVER_RAN and name in self._hooks.elsewhere
                missing[name] = OTHER_THREADS if elsewhere else why
                continue
            if id(node) not in results:
                with named_layer(name):
                    results[id(node)] = result(node.learner)
            learned[name] = results[id(node)]
        stopped = {name: self._stopped.get(name, reason) for name in learned}
        return kind(learned, missing=missing, stopped=stopped)

    def snapshot(self) -> CollectorState[C]:
        """Return the state; between batches only."""
        return CollectorState(
            dict(self._inputs.node_of),
            dict(self._ran),
            dict(self._stopped),
            dict(self._failed),
            frozenset(self._weight_use.used),
        )

    def restore(self, snapshot: CollectorState[C]) -> None:
        """Restore the state of another collector of the same layers."""
        self._inputs.node_of.update(snapshot.node_of)
        self._ran = dict(snapshot.ran)
        self._failed = dict(snapshot.failed)
        self._weight_use.used |= snapshot.bypassed
        for name in snapshot.failed:
            self._hooks.remove(name)
        for name, reason in snapshot.stopped.items():
            self._stop(name, reason)

    def _stop_layers(self) -> None:
        """Remove the hooks of layers that have converged or reached ``max_rows``."""
        for name in [n for n in self._layers if n not in self._stopped and n not in self._failed]:
            node = self._inputs.node_of[name]
            if node.convergence is not None and node.convergence.reached:
                self._stop(name, f"converged, excess about {node.convergence.estimate:.1e}")
            elif self._max_rows is not None and _rows_of(node.learner) >= self._max_rows:
                self._stop(name, f"max_rows of {self._max_rows:,} reached")

    def _stop(self, name: str, reason: str) -> None:
        self._hooks.remove(name)
        self._stopped[name] = reason

    def _layer_hooks(self, source: Source) -> Iterator[Hook]:
        for name, module in self._layers.items():
            if source == "outputs":
                yield Hook(name, module, partial(self._before_output, name))
                yield Hook(name, module, partial(self._observe_output, name), after=True)
            else:
                yield Hook(name, module, partial(self._observe_input, name))

    def _observe_input(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._learn(name, module, lambda: input_of(module, args, kwargs))

    def _before_output(self, name: str, module: nn.Module, *_: Any) -> None:
        if name not in self._failed:
            with self._drop_failed_layer(name):
                check_unsharded(module)

    def _observe_output(
        self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        self._learn(name, module, lambda: output_of(module, output))

    def _learn(self, name: str, module: nn.Module, activation: Callable[[], torch.Tensor]) -> None:
        """Begin the update of a layer by its activation, and finish the updates that are due."""
        while self._inputs.is_pending(name):  # the batch's second call of the layer
            self._finish_update()
        if name in self._failed:  # in an update that was finished while the forward continued
            return
        with self._drop_failed_layer(name):
            self._begin(name, module, activation())
        self._finish_updates(due=True)

    def _begin(self, name: str, module: nn.Module, activation: torch.Tensor) -> None:
        """Move a layer by an activation; begin the update if no other layer has."""
        check_tensors(module, activation)
        view = self._views[name]
        self._ran[name] = activation.device
        key = self._reader.key_of(activation, view)
        if self._inputs.advance(name, key):
            return
        rows = lasting_rows(activation, self._reader.read(name, activation, view))
        self._inputs.begin(name, key, rows)
        self.rows = self.rows or int(rows[0].shape[0])

    def _finish_updates(self, *, due: bool = False) -> None:
        """Finish the updates that have begun, or those that are due."""
        while self._inputs.has_pending(due=due):
            self._finish_update()

    def _finish_update(self) -> None:
        for name, error in self._inputs.finish().items():
            with self._drop_failed_layer(name):
                raise error

    @contextmanager
    def _drop_failed_layer(self, name: str) -> Iterator[None]:
        """Add the layer's name to errors; with ``drop_failed``, remove its hooks instead."""
        try:
            with named_layer(name):
                yield
        except IPAError as error:
            if not self._drop_failed:
                raise
            self._hooks.remove(name)
            self._failed[name] = str(error)


def _view(name: str, module: nn.Module, source: Source) -> RowView:
    with named_layer(name):
        return view_of(module) if source == "inputs" else output_view(module)


def _rows_of(learner: RowConsumer) -> int:
    """Return the rows of a learner; a row counts once, however many passes are made over it."""
    return -(-learner.samples // learner.passes)
