"""Find code of a model that asks for the class of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType

from torch import nn

from ipa_core.caller_warnings import warn_caller
from ipa_torch._adapters.adapter_layer import AdapterLayer

_QUESTIONS = {"isinstance", "type", "__class__"}


def warn_of_class_checks(model: nn.Module, names: Iterable[str]) -> None:
    """Warn if the forward of a part of the model asks for the class of one of the named layers."""
    if owners := find_class_checks(model, map(model.get_submodule, names)):
        warn_caller(
            f"the forward of {', '.join(owners)} asks for the class of its layers: with adapters "
            "`isinstance` finds that of the layer, but not where it is compiled, and `type` finds "
            "AdapterLayer; compare the outputs with those before `attach`",
        )


def find_class_checks(model: nn.Module, layers: Iterable[nn.Module]) -> list[str]:
    """Return the classes of a model's parts whose forward asks for the class of one of the layers.

    Read off the names in the code of ``forward`` and of the methods that it calls.

    Examples
    --------
    >>> class Net(nn.ModuleList):
    ...     def forward(self, x):
    ...         for layer in self:
    ...             x = layer(x) if type(layer) is nn.Linear else x
    ...         return x
    >>> find_class_checks(net := Net([nn.Linear(2, 2)]), net)
    ['Net']
    """
    asked = {kind.__name__ for layer in layers for kind in type(layer).__mro__}
    asked -= {kind.__name__ for kind in nn.Module.__mro__}
    owners = {
        type(module)
        for module in model.modules()
        if not (isinstance(module, AdapterLayer) or type(module).__module__.startswith("torch."))
    }
    return sorted(
        owner.__name__
        for owner in owners
        if any(_QUESTIONS & names and asked & names for names in _names(owner))
    )


def _names(owner: type) -> Iterator[set[str]]:
    """Yield the names in the code of each method that a class's forward leads to."""
    seen: set[str] = set()
    stack = ["forward"]
    while stack:
        method = stack.pop()
        function = getattr(owner, method, None)
        if method in seen or not isinstance(function, FunctionType):
            continue
        seen.add(method)
        names = set(_names_in(function.__code__))
        stack.extend(names)
        yield names


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
