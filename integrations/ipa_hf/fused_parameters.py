"""Fused experts of transformers: three-axis parameters with a matrix for each expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ipa_core.settings import check_instance, check_iterable
from ipa_hf.layer_names import base_name
from ipa_torch import LayerError
from ipa_torch.extension import check_model

ExpertSharing = Literal["never", "unreached", "always"]
#: Names of the parameters in transformers' interface of experts.
_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FusedParameter:
    """Three-axis parameter of an experts module.

    Parameters
    ----------
    name : str
        Full name of the parameter in the model without adapters.
    experts : torch.nn.Module
        The module that holds the parameter.
    """

    name: str
    experts: nn.Module

    @property
    def leaf(self) -> str:
        """Name of the parameter in its module."""
        return self.name.rpartition(".")[2]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of experts, features and outputs."""
        count, outputs, features = getattr(self.experts, self.leaf).shape
        if getattr(self.experts, "is_transposed", False):
            features, outputs = outputs, features
        return count, features, outputs

    @property
    def matrix_names(self) -> list[str]:
        """Names of the experts' matrices: ``name[0]``, ``name[1]`` and so on."""
        return [f"{self.name}[{expert}]" for expert in range(self.sizes[0])]

    @property
    def shared_name(self) -> str:
        """Name of the projection shared by all experts of the layer."""
        return f"{self.name}[:]"

    def layer_names(self, sharing: ExpertSharing) -> list[str]:
        """Return names of the layers of `ipa_hf.expert_layers` for the parameter."""
        separate = [] if sharing == "always" else self.matrix_names
        return separate if sharing == "never" else [*separate, self.shared_name]


def fused_parameters(model: nn.Module, targets: Iterable[str]) -> dict[str, FusedParameter]:
    """Return the fused parameters matched by targets, by their names in the base model.

    Parameters
    ----------
    model : torch.nn.Module
        A model with or without PEFT's wrappers.
    targets : iterable of str
        Full names or suffixes after a dot, as in PEFT's ``target_parameters``.

    Raises
    ------
    SettingError
        If the targets are no names.
    LayerError
        If nothing matches, or the inputs of a matched parameter cannot be observed.
    """
    check_model(model)
    check_iterable("targets", targets, "names of fused parameters", cure="pass a list of them")
    suffixes = tuple(targets)
    for name in suffixes:
        check_instance("each name of the targets", name, str, "a string")
    matched = {
        name: FusedParameter(name, module)
        for name, module in _parameters(model)
        if any(name == target or name.endswith(f".{target}") for target in suffixes)
    }
    if not matched:
        raise LayerError(
            f"expected parameters named {list(suffixes)}, got none; see model.named_parameters()"
        )
    for name, fused in matched.items():
        if (reason := refusal(fused.experts, fused.leaf)) is not None:
            raise LayerError(
                f"layer {name!r}: expected fused experts, got {reason}; leave it out of the targets"
            )
    return matched


def refusal(module: nn.Module, parameter: str) -> str | None:
    """Return the reason that the inputs of a parameter cannot be observed; None if they can."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return f"{kind}, which target_modules can name"
    if not hasattr(module, "_is_expert_parallel"):  # set by use_experts_implementation
        return f"{kind}, which does not compute through transformers' ALL_EXPERTS_FUNCTIONS"
    if parameter not in _PARAMETERS:
        return f"{kind}, whose {parameter!r} multiplies no rows"
    weight = getattr(module, parameter)
    if weight.dtype not in _FLOATING:
        return f"{kind}, whose weights are {weight.dtype}"
    return None


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            yield f"{base_name(name)}.{leaf}", module
