"""From what a layer is called with to the rows it multiplies."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ipa_core.errors import ArrayTypeError


def input_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the activation among the arguments of a call, positional or by keyword.

    Raises
    ------
    ArrayTypeError
        If none is a floating tensor.
    """
    for value in (*args, *_in_order(module, kwargs)):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise ArrayTypeError(
        f"expected a floating tensor among the inputs of {type(module).__name__}, got none; "
        "leave the layer out of the targets"
    )


def _in_order(module: nn.Module, kwargs: Mapping[str, Any]) -> list[Any]:
    """Return keyword arguments in the order of the module's own signature."""
    if len(kwargs) < 2:
        return list(kwargs.values())
    own = [name for name in inspect.signature(module.forward).parameters if name in kwargs]
    return [kwargs[name] for name in (*own, *(name for name in kwargs if name not in own))]
