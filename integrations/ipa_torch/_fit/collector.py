"""Hooks that hand the inputs of layers to learners."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from ipa_core import Learner, Projector
from ipa_core.errors import IPAError, with_context
from ipa_torch._capture.bypass_detection import WeightWatch
from ipa_torch._capture.eval_mode import full_precision
from ipa_torch._capture.row_weights import RowFilter
from ipa_torch._capture.tensor_ids import Identities
from ipa_torch._fit.shared_inputs import Histories, Node
from ipa_torch._layers.matmul_view import Reading, Rows, input_of, reading_of
from ipa_torch.errors import LayerError
from ipa_torch.projectors import Projectors

NEVER_RAN = "its forward never ran"
BYPASSED = "its weight is used without calling it, which no hook and no adapter can see"
NO_ROWS = "it saw no row of positive weight"


@dataclass(frozen=True)
class Standing:
    """What a listener knows.

    Parameters
    ----------
    at : mapping of str to Node
        For each layer the history it is at; layers that always saw the same inputs are at one.
    ran : mapping of str to torch.device
        Layers whose forward ran, and where.
    stopped, unfit : mapping of str to str
        Layers that learn no more because they have enough, or because of an input; and why.
    bypassed : frozenset of str
        Layers whose weight was used by another function than their forward.
    """

    at: Mapping[str, Node]
    ran: Mapping[str, torch.device]
    stopped: Mapping[str, str]
    unfit: Mapping[str, str]
    bypassed: frozenset[str]

    def missing(self, name: str) -> str | None:
        """Return why there is no projector for a layer, if there is none."""
        if name in self.unfit:
            return self.unfit[name]
        if name not in self.ran:
            return BYPASSED if name in self.bypassed else NEVER_RAN
        return None if self.at[name].learner.samples else NO_ROWS

    def groups(self) -> list[tuple[Node, list[str]]]:
        """Return each history with its layers, in the model's order."""
        nodes: dict[int, tuple[Node, list[str]]] = {}
        for name, node in self.at.items():
            nodes.setdefault(id(node), (node, []))[1].append(name)
        return list(nodes.values())


class Listener:
    """Listens to layers between ``__enter__`` and ``__exit__``, and learns."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        histories: Histories,
        row_filter: RowFilter,
        *,
        max_patches: int | None,
        max_rows: int | None,
        keep_going: bool,
    ) -> None:
        self._layers = layers
        self._readings = {name: _reading(name, module) for name, module in layers.items()}
        self._histories = histories
        self._filter = row_filter
        self._max_patches = max_patches
        self._max_rows = max_rows
        self._keep_going = keep_going
        self._identities = Identities()
        self._handles: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._watch = WeightWatch(layers)
        self._ran: dict[str, torch.device] = {}
        self._stopped: dict[str, str] = {}
        self._unfit: dict[str, str] = {}
        self._open: _Open | None = None
        self.rows = 0

    @property
    def passes(self) -> int:
        """How often the learners want to read the batches."""
        return max(node.learner.passes for node in self._histories.at.values())

    @property
    def done(self) -> bool:
        """Whether every layer that ever ran has stopped."""
        return bool(self._ran) and self._ran.keys() <= {*self._stopped, *self._unfit}

    @property
    def heard(self) -> bool:
        """Whether any layer has learned."""
        return any(node.learner.samples for node in self._histories.at.values())

    def __enter__(self) -> Self:
        try:
            self._filter.open()
            for name, module in self._layers.items():
                hook = partial(self._hear, name)
                self._handles[name] = module.register_forward_pre_hook(hook, with_kwargs=True)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

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
            try:
                self._settle()
            finally:
                self._histories.end_batch()
                self._identities.clear()
        if weighted is not None:
            self.rows = weighted
        self._stop_layers()

    def finish(self, reason: str) -> Projectors:
        """Return what was learned; layers on one history get one projector."""
        made: dict[int, Projector] = {}
        learned, missing = {}, {}
        standing = self.standing()
        for name, node in standing.at.items():
            if (missed := standing.missing(name)) is not None:
                missing[name] = missed
                continue
            if id(node) not in made:
                made[id(node)] = self._finalized(name, node.learner)
            learned[name] = made[id(node)]
        stopped = {name: self._stopped.get(name, reason) for name in learned}
        return Projectors(learned, missing=missing, stopped=stopped)

    def standing(self) -> Standing:
        """Return where learning stands; between batches only."""
        return Standing(
            dict(self._histories.at),
            dict(self._ran),
            dict(self._stopped),
            dict(self._unfit),
            frozenset(self._watch.used),
        )

    def resume(self, standing: Standing) -> None:
        """Go on from where another listener to these layers stood."""
        self._histories.at.update(standing.at)
        self._ran = dict(standing.ran)
        self._unfit = dict(standing.unfit)
        self._watch.used |= standing.bypassed
        for name in standing.unfit:
            self._handles.pop(name).remove()
        for name, reason in standing.stopped.items():
            self._stop(name, reason)

    def _close(self) -> None:
        self._filter.close()
        for name in list(self._handles):
            self._handles.pop(name).remove()

    def _stop_layers(self) -> None:
        """Take the hooks off layers that have converged or spent their rows."""
        for name in list(self._handles):
            node = self._histories.at[name]
            if node.convergence is not None and node.convergence.reached:
                self._stop(name, f"converged, excess about {node.convergence.estimate:.1e}")
            elif self._max_rows is not None and node.learner.samples >= self._max_rows:
                self._stop(name, f"max_rows of {self._max_rows:,} reached")

    def _stop(self, name: str, reason: str) -> None:
        self._handles.pop(name).remove()
        self._stopped[name] = reason

    def _finalized(self, name: str, learner: Learner) -> Projector:
        with _named(name), full_precision(self._ran[name]):
            return learner.finalize()

    def _hear(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._settle()
        if name in self._unfit:  # found out by settling, in a model that went on all the same
            return
        with self._forgiving(name):
            activation = input_of(module, args, kwargs)
            with full_precision(activation.device):
                rest = self._begin(name, activation)
                if rest is None:
                    return
                if not _answers_late(activation.device):
                    return rest()
            # The layer's own product is queued before the host waits for what it has asked.
            handle = module.register_forward_hook(lambda *_: self._settle())
            self._open = _Open(name, activation, _version(activation), rest, handle)

    def _begin(self, name: str, activation: torch.Tensor) -> Callable[[], None] | None:
        reading = self._readings[name]
        event = self._identities.number(activation), reading
        self._ran[name] = activation.device
        return self._histories.see(name, event, partial(self._rows, activation, reading))

    def _settle(self) -> None:
        """Finish the update that is open, if one is."""
        if self._open is None:
            return
        opened, self._open = self._open, None
        opened.handle.remove()
        with self._forgiving(opened.name), full_precision(opened.activation.device):
            opened.finish()

    @contextmanager
    def _forgiving(self, name: str) -> Iterator[None]:
        """Give errors the layer's name; leave the layer out where others are to go on."""
        try:
            with _named(name):
                yield
        except IPAError as error:
            if not self._keep_going:
                raise
            self._handles.pop(name).remove()
            self._unfit[name] = str(error)

    def _rows(self, activation: torch.Tensor, reading: Reading) -> Rows:
        chosen = self._filter(activation, reading.leading(activation))
        rows, weights = reading.rows(activation.detach(), chosen, self._max_patches)
        if not self.rows:
            self.rows = int(rows.shape[0])
        return rows, weights


@dataclass(frozen=True)
class _Open:
    """An update between its two halves, while the layer itself computes."""

    name: str
    activation: torch.Tensor
    version: int
    rest: Callable[[], None]
    handle: torch.utils.hooks.RemovableHandle

    def finish(self) -> None:
        if _version(self.activation) != self.version:
            raise LayerError(
                "expected a layer that leaves its input as it is, got one that changes it in "
                "place; leave it out of the targets"
            )
        self.rest()


def _answers_late(device: torch.device) -> bool:
    """Return whether the host can go on while the device computes."""
    return device.type != "cpu"


def _version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was changed in place, as far as torch counts it."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Give errors of the core the layer's name."""
    try:
        yield
    except IPAError as error:
        raise with_context(error, f"layer {name!r}") from error


def _reading(name: str, module: nn.Module) -> Reading:
    with _named(name):
        return reading_of(module)
