"""Digests of the weights before the target layers of a run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ipa_core.errors import SettingError
from ipa_torch._capture.hooks import Hook, HookSet
from ipa_torch._fit.tensor_digest import tensor_digest

#: Entries of each weight that are compared, and letters of a digest that are kept.
_ENTRIES, _LETTERS = 256, 16


class WeightDigests:
    """Digests of the weights on which the inputs of target layers depend.

    These are the weights of modules that start before the last call of a target layer in the first
    batch: not those of a head that is initialized anew in each process.

    Parameters
    ----------
    model : torch.nn.Module
    layers : collection of torch.nn.Module
        The target layers.

    Examples
    --------
    >>> body, head = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> model = nn.Sequential(body, nn.ReLU(), head)
    >>> digests = WeightDigests(model, [head])
    >>> with digests.first_batch():
    ...     y = model(torch.ones(1, 2))
    >>> list(digests.digests)
    ['0.weight', '0.bias']
    """

    def __init__(self, model: nn.Module, layers: Collection[nn.Module]) -> None:
        self._model = model
        self._layers = layers
        # Before the first pass: FSDP keeps whole weights after it.
        self._all = {name: _digest(tensor) for name, tensor in _weights(model)}
        self._names: list[str] | None = None

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each weight, by its name."""
        return {name: self._all[name] for name in self._names or ()}

    @contextmanager
    def first_batch(self) -> Iterator[None]:
        """Record the modules that run in the first batch; without effect afterwards."""
        if self._names is not None:
            yield
            return
        started: dict[nn.Module, None] = {}
        before: set[nn.Module] = set()
        targets = {id(layer) for layer in self._layers}

        def record(module: nn.Module, *_: Any) -> None:
            if id(module) in targets:
                before.update(started)
            started[module] = None

        with HookSet(
            Hook(None, module, record)
            for module in self._model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ):
            yield
        self._names = [
            name for name in _names_in(self._model, "", before, started) if name in self._all
        ]

    def check(self, expected: Mapping[str, str], folder: Path) -> None:
        """Compare the weights with the digests of a folder.

        Raises
        ------
        SettingError
            If one differs; the message names it.
        """
        different = [name for name, digest in expected.items() if self._all.get(name) != digest]
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise SettingError(
                f"{folder}: expected the weights of the run that wrote it, got other values of "
                f"{', '.join(map(repr, different[:3]))}{more}; load the same weights, use another "
                "folder, or delete this folder to start over"
            )
        self._names = list(expected)


def _weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a state dict would have, without its copies and hooks."""
    seen: set[int] = set()
    for name, part in module.named_modules(prefix=prefix):
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is None or key in part._non_persistent_buffers_set or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield f"{name}.{key}" if name else key, tensor


def _digest(tensor: torch.Tensor) -> str:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if type(local) not in (torch.Tensor, nn.Parameter) or nn.parameter.is_lazy(local):
        return type(local).__name__  # of a quantization library, or without values yet
    return tensor_digest(local, _ENTRIES)[:_LETTERS]


def _names_in(
    module: nn.Module, prefix: str, before: set[nn.Module], ran: Collection[nn.Module],
    included: bool = False,
) -> Iterator[str]:  # fmt: skip
    """Yield the names of the weights of modules that ran before, and of their parts."""
    # A part that is never called is read by the module around it; entries of a ModuleDict are
    # alternatives, as PEFT's adapters are, of which those that never ran are not in use.
    included = module in before if module in ran else included
    if included:
        for key in (*module._parameters, *module._buffers):
            yield f"{prefix}{key}"
    for name, child in module._modules.items():
        if child is not None:
            used = included and not isinstance(module, nn.ModuleDict)
            yield from _names_in(child, f"{prefix}{name}.", before, ran, used)
