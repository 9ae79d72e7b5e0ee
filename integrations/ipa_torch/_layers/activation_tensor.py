"""Activation of a layer among the arguments or the outputs of a call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ipa_core.errors import ArrayTypeError, ShapeError


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
    """Check that a layer's weights and its input or output are tensors that rows can be read of.

    Raises
    ------
    ArrayTypeError
        If the activation is a nested tensor, a `DTensor` or of another class that computes by its
        own rules, or `torch.func` transforms it or the layer's weights.
    ShapeError
        If the activation has no axis of features.
    """
    if (form := _unreadable_form(module, activation)) is not None:
        kind, cure = form
        raise ArrayTypeError(
            f"expected ordinary tensors as activations and weights of {type(module).__name__}, got "
            f"{kind}; {cure}, or leave it out of the targets"
        )
    if activation.ndim == 0:
        raise ShapeError(
            f"expected activations of {type(module).__name__} with an axis of features, got a "
            "scalar; leave it out of the targets"
        )


def check_unsharded(module: nn.Module) -> None:
    """Check that no rank holds but a part of a layer's outputs, as in tensor parallelism.

    FSDP gathers the weights before the layer runs, where this is called.

    Raises
    ------
    ArrayTypeError
        If a weight is a `DTensor`.
    """
    if any(map(_is_sharded, module._parameters.values())):
        raise ArrayTypeError(
            f"expected weights of {type(module).__name__} that are whole while it runs, got "
            "DTensors; learn before the model is parallelized, or leave it out of the targets"
        )


def _unreadable_form(module: nn.Module, activation: torch.Tensor) -> tuple[str, str] | None:
    """Return what is wrong with the tensors of a layer, and a cure; None if nothing is."""
    is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
    tensors = (activation, *module._parameters.values())
    if any(is_transformed(tensor) for tensor in tensors if tensor is not None):
        return "a transformed tensor", "learn outside of torch.func"
    if activation.is_nested:
        return "a nested tensor", "give padded batches with row_weights"
    if activation.layout != torch.strided:  # an output: `input_of` has refused such an input
        return f"a tensor of layout {activation.layout}", "let it return dense tensors"
    if _is_sharded(activation):
        return "a DTensor", "learn before the model is parallelized, or give it full_tensor()"
    if type(activation).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a {type(activation).__name__}", "give it tensors of torch.Tensor"
    return None


def _is_sharded(tensor: torch.Tensor | None) -> bool:
    """Return whether a tensor is a `DTensor`, of which a rank may hold a part only."""
    return hasattr(tensor, "full_tensor")


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
