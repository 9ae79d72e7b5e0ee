"""Change of a model's adapters that happens whole or not at all, also after an interruption."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ipa_torch._adapters.adapter_layer import AdapterLayer, adapter_layers
from ipa_torch._adapters.hook_transfer import HOOK_ATTRIBUTES
from ipa_torch._adapters.layer_replacement import module_references
from ipa_torch._adapters.pass_lock import changing
from ipa_torch._adapters.shared_projection import SharedProjection
from ipa_torch._layers.unwrap import unwrap_model

#: Attributes of any module that a change of adapters sets, beside its flags.
_ATTRIBUTES = frozenset({"_modules", "_parameters", *HOOK_ATTRIBUTES})
#: Modules of which a change may set every attribute.
_OF_ADAPTERS = (AdapterLayer, SharedProjection, nn.ModuleDict, nn.ParameterDict)


@contextmanager
def atomic_change(
    model: nn.Module, *, structure: bool = False, tensors: Iterable[torch.Tensor] = ()
) -> Iterator[None]:
    """Enclose a change of adapters beside passes of other threads; an error undoes it.

    Values of other tensors are not restored: a change makes new tensors, or uses `write_tensors`.
    A change may contain others.

    Parameters
    ----------
    model : torch.nn.Module
    structure : bool, default False
        Restore layers, hooks and flags of the whole model, not of adapter layers only.
    tensors : iterable of torch.Tensor
        Tensors whose values are restored as well.
    """
    with changing(model):
        saved = _SavedModel(unwrap_model(model), structure)
        values = [(tensor, tensor.detach().clone()) for tensor in tensors]
        try:
            yield
        except BaseException:
            saved.restore()
            write_tensors(values)
            raise


def write_tensors(values: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write values into tensors, pairs of a tensor and its value; into all or, on an error, none.

    Examples
    --------
    >>> x = torch.zeros(2)
    >>> write_tensors([(x, torch.ones(2))])
    >>> x
    tensor([1., 1.])
    """
    pairs = list(values)
    with torch.no_grad():
        before = [tensor.clone() for tensor, _ in pairs]
        try:
            for tensor, value in pairs:
                tensor.copy_(value)
        except BaseException:
            for (tensor, _), value in zip(pairs, before, strict=True):
                tensor.copy_(value)
            raise


class _SavedModel:
    """Attributes, flags and references of a model that a change of adapters may set."""

    def __init__(self, model: nn.Module, structure: bool) -> None:
        of_adapters = (part for _, layer in adapter_layers(model) for part in layer.modules())
        modules = dict.fromkeys(model.modules() if structure else of_adapters)
        self._attributes = [(vars(module), _settable(module)) for module in modules]
        self._contents = [
            (value, value.copy())
            for _, attributes in self._attributes
            for value in attributes.values()
            if isinstance(value, dict)
        ]
        self._flags = [
            (parameter, parameter.requires_grad)
            for module in modules
            for parameter in module._parameters.values()
            if parameter is not None
        ]
        self._references = [
            (replace, module)
            for module, replace, _ in (module_references(model, set()) if structure else ())
            if replace is not None
        ]

    def restore(self) -> None:
        """Set everything as it was."""
        for held, attributes in self._attributes:
            for key in [key for key in held if key.startswith("_ipa_")]:
                del held[key]
            held.update(attributes)
        for container, contents in self._contents:
            container.clear()
            container.update(contents)
        for replace, module in self._references:
            replace(module)
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def _settable(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that a change of adapters may set."""
    return {
        key: value
        for key, value in vars(module).items()
        if type(module) in _OF_ADAPTERS
        or key in _ATTRIBUTES
        or key.startswith("_ipa_")
        or isinstance(value, bool)  # a flag, such as that of training mode
    }
