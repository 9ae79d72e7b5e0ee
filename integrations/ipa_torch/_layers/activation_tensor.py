"""Activation of a layer among the arguments or the outputs of a call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ipa_core.errors import ArrayTypeError


def input_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the first floating tensor among the arguments of a call.

    Raises
    ------
    ArrayTypeError
        If there is none.
    """
    for value in (*args, *_in_order(module, kwargs)):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            if value.layout not in (torch.strided, torch.jagged):
                raise ArrayTypeError(
                    f"expected a dense input of {type(module).__name__}, got a tensor of layout "
                    f"{value.layout}; give it dense tensors, or leave it out of the targets"
                )
            return value
    raise ArrayTypeError(
        f"expected a floating tensor among the inputs of {type(module).__name__}, got none; "
        "leave the layer out of the targets"
    )


def check_tensors(module: nn.Module, activation: torch.Tensor) -> None:
    """Check that a layer and its input are ordinary tensors, of which rows can be read.

    Raises
    ------
    ArrayTypeError
        If the input is nested, or `torch.func` transforms it or the layer's weights.
    """
    tensors = (activation, *module._parameters.values())
    is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
    transformed = any(is_transformed(tensor) for tensor in tensors if tensor is not None)
    if activation.is_nested or transformed:
        kind, cure = (
            ("a transformed tensor", "learn outside of torch.func")
            if transformed
            else ("a nested tensor", "give padded batches with row_weights")
        )
        raise ArrayTypeError(
            f"expected ordinary tensors as input and weights of {type(module).__name__}, got "
            f"{kind}; {cure}, or leave it out of the targets"
        )


def _in_order(module: nn.Module, kwargs: Mapping[str, Any]) -> list[Any]:
    """Return keyword arguments in the order of the module's signature."""
    if len(kwargs) < 2:
        return list(kwargs.values())
    known = [name for name in inspect.signature(module.forward).parameters if name in kwargs]
    return [kwargs[name] for name in (*known, *(name for name in kwargs if name not in known))]


def output_of(module: nn.Module, output: Any) -> torch.Tensor:
    """Return the first floating tensor among the outputs of a layer.

    Raises
    ------
    ArrayTypeError
        If there is none.
    """
    for value in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise ArrayTypeError(
        f"expected a floating tensor among the outputs of {type(module).__name__}, got none; "
        "leave the layer out of the targets"
    )
