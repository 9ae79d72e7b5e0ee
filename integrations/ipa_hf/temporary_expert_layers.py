"""Temporary layers for the matrices of fused experts, whose inputs hooks can observe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ipa_core.errors import SettingError
from ipa_core.settings import boolean
from ipa_hf.expert_forward import MODULE_LAYERS, ModuleLayers, forward_expert_by_expert
from ipa_hf.expert_linear import ExpertLinear
from ipa_hf.fused_parameters import ExpertSharing, fused_parameters
from ipa_torch.extension import check_choice

#: Name of `forward_expert_by_expert` in transformers' registry.
_IMPLEMENTATION = "ipa_expert_by_expert"


@contextmanager
def expert_layers(
    model: nn.Module,
    targets: Iterable[str],
    *,
    sharing: ExpertSharing = "never",
    routing_weights: bool = False,
) -> Iterator[list[str]]:
    """Add a layer for each matrix of fused experts, within the context.

    The layers observe the inputs of the experts: `ipa_torch.fit_projectors`,
    `ipa_torch.learner_bytes` and `ipa_torch.store_activations` take their names as targets. The
    outputs of the model stay equal up to rounding.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model, with or without PEFT's wrappers. Restored on exit.
    targets : iterable of str
        Fused parameters, as in PEFT's ``target_parameters``: ``["mlp.experts.gate_up_proj"]``.
    sharing : {"never", "unreached", "always"}, default "never"
        ``"never"``: a layer for each expert, ``name[0]`` and so on. ``"always"``: a single layer
        ``name[:]`` for all experts. Its rows are the tokens, weighted by the number of their
        experts, or for ``down_proj`` the intermediate activations of all experts.
        ``"unreached"``: both.
    routing_weights : bool, default False
        Multiply the weights of rows by the router's weights.

    Yields
    ------
    list of str
        Names of the layers.

    Raises
    ------
    LayerError
        If nothing matches, or the inputs of a parameter cannot be observed; the message names it.
    SettingError
        If a setting has another type or value, or the experts have such layers already.

    Notes
    -----
    Within the context experts are computed in a loop, as by transformers' implementation
    ``"eager"``, which is slower than ``"grouped_mm"`` on accelerators.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import fit_projectors
    >>> from transformers import MixtralConfig, MixtralModel
    >>> size = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, vocab_size=16)
    >>> heads = dict(num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    >>> model = MixtralModel(MixtralConfig(**size, **heads))
    >>> batches = [torch.arange(16).reshape(2, 8)]
    >>> with expert_layers(model, ["experts.down_proj"]) as names:
    ...     projectors = fit_projectors(model, batches, 2, targets=names, progress=False)
    >>> list(projectors)
    ['layers.0.mlp.experts.down_proj[0]', 'layers.0.mlp.experts.down_proj[1]']
    """
    check_choice("sharing", sharing, ExpertSharing)
    routing_weights = boolean("routing_weights", routing_weights)
    parameters = fused_parameters(model, targets).values()
    by_experts: dict[nn.Module, ModuleLayers] = {}
    for fused in parameters:
        added = by_experts.setdefault(fused.experts, ModuleLayers({}, routing_weights))
        for name in fused.layer_names(sharing):
            added.layers[name.rpartition(".")[2]] = ExpertLinear(*fused.sizes[1:])
    with ExitStack() as stack:
        for experts, added in by_experts.items():
            stack.enter_context(_use_layers(experts, added))
        for fused in parameters:
            # PEFT's outermost wrapper, if the experts are wrapped.
            parent = model.get_submodule(fused.name.rpartition(".")[0])
            for name in fused.layer_names(sharing):
                leaf = name.rpartition(".")[2]
                parent.add_module(leaf, by_experts[fused.experts].layers[leaf])
                stack.callback(parent._modules.pop, leaf)
        yield [name for fused in parameters for name in fused.layer_names(sharing)]


@contextmanager
def _use_layers(experts: Any, added: ModuleLayers) -> Iterator[None]:
    """Make an experts module compute with its layers."""
    if experts in MODULE_LAYERS:
        raise SettingError(
            "expected experts without layers of expert_layers(), got a second context; leave the "
            "first one before"
        )
    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, forward_expert_by_expert)
    config = experts.config
    # The public attribute would set it in the sub-configurations too.
    previous = config._experts_implementation_internal
    MODULE_LAYERS[experts] = added
    config._experts_implementation_internal = _IMPLEMENTATION
    try:
        yield
    finally:
        config._experts_implementation_internal = previous
        del MODULE_LAYERS[experts]
