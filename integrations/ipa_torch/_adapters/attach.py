"""Attach adapters to a model, and detach them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ipa_core import Projector
from ipa_core.errors import SettingError
from ipa_core.settings import boolean, check_instance
from ipa_torch._adapters.active_adapter import existing_adapter, list_adapters, set_adapter
from ipa_torch._adapters.adapter_layer import adapter_layers
from ipa_torch._adapters.adapter_scale import Scaling, check_scaling, resolve_scale
from ipa_torch._adapters.atomic_change import atomic_change
from ipa_torch._adapters.class_checks import warn_of_class_checks
from ipa_torch._adapters.freezing import freeze, unfreeze
from ipa_torch._adapters.layer_replacement import (
    check_replaceable,
    replace_by_adapter_layers,
    restore_base_layers,
)
from ipa_torch._adapters.merge import warn_of_merged_weights
from ipa_torch._adapters.pass_lock import remove_pass_lock
from ipa_torch._adapters.shared_projection import SharedProjection
from ipa_torch._distributed.parallel_wrappers import check_unwrapped
from ipa_torch._layers.adapter_support import check_fit
from ipa_torch._layers.layer_lookup import get_layer
from ipa_torch._layers.unwrap import unwrap_model
from ipa_torch._settings import check_dropout
from ipa_torch.layer_projectors import as_tensor, check_projectors


def attach(
    model: nn.Module,
    projectors: Mapping[str, Projector],
    *,
    scaling: Scaling = "energy",
    trainable: bool = False,
    dropout: float = 0.0,
    adapter_name: str = "default",
) -> None:
    r"""Add a low-rank adapter to each layer: :math:`W x + B \, s P x`, with B = 0 at first.

    The model's outputs are unchanged until B is trained. B, and P if ``trainable``, are the only
    parameters that require a gradient: unfreeze a head yourself. Layers with the same projector and
    the same input tensor compute P x once.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place: each layer is replaced by an `AdapterLayer` around it.
    projectors : mapping of str to Projector
        By layer names, as from `fit_projectors`.
    scaling : "energy" or float, default "energy"
        s. ``"energy"`` gives s P x the energy that LoRA's random A would give it, layer by layer,
        so that learning rates carry over between models (about ten times LoRA's for a frozen P). A
        number is the paper's lambda. With a frozen P and Adam, s and the learning rate are
        equivalent: halving s and doubling the rate changes nothing.
    trainable : bool, default False
        Train P as well. A frozen P is a buffer; it saves P x for the backward pass and not x.
    dropout : float, default 0
        Probability with which entries of P x are dropped in training.
    adapter_name : str, default "default"
        Name of the adapter, which becomes active. Adapters share equal frozen projectors.

    Raises
    ------
    LayerError
        If a layer is not in the model, its forward would never run, or its class is unsupported.
    ShapeError
        If a projector and its layer have different numbers of features.
    SettingError
        If the name is in use or invalid, a number is out of range, or the model is wrapped in DDP
        or FSDP.

    Notes
    -----
    Cost for n rows: O(n r (features + outputs)) for each layer, the part of the features once for
    layers that share P x.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import attach, fit_projectors
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(32, 16)
    >>> before = model(x)
    >>> attach(model, fit_projectors(model, [x], rank=2, progress=False))
    >>> torch.equal(model(x), before)
    True
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.lora_B.default', '2.lora_B.default']
    """
    check_projectors(projectors)
    if not projectors:
        raise SettingError("expected projectors of at least one layer, got none")
    layers = check_attachable(
        model,
        projectors,
        scaling=scaling,
        trainable=trainable,
        dropout=dropout,
        adapter_name=adapter_name,
    )
    for name, projector in projectors.items():
        check_fit(name, layers[name], projector.features)
    specs = {
        id(projector): ProjectionSpec(
            as_tensor(projector.components), resolve_scale(projector, scaling), bool(trainable)
        )
        for projector in projectors.values()
    }
    layer_specs = {name: specs[id(projector)] for name, projector in projectors.items()}
    model = unwrap_model(model)
    with atomic_change(model, structure=True):
        add_adapter(model, layer_specs, dropout, adapter_name)


def check_attachable(
    model: nn.Module,
    names: Iterable[str],
    *,
    scaling: Scaling,
    trainable: bool,
    dropout: float,
    adapter_name: str = "default",
) -> dict[str, nn.Module]:
    """Check all that `attach` asks of a model and its settings but for projectors.

    For callers that fit projectors first, whose work would be lost.

    Returns
    -------
    dict of str to torch.nn.Module
        The layers of these names.

    Raises
    ------
    LayerError, SettingError
        As for `attach`.
    """
    check_unwrapped(model)
    model = unwrap_model(model)
    check_scaling(scaling)
    boolean("trainable", trainable)
    check_dropout(dropout)
    check_new(model, adapter_name)
    layers = {name: get_layer(model, name) for name in names}
    check_replaceable(model, layers)
    return layers


@dataclass(frozen=True, eq=False)
class ProjectionSpec:
    """P of shape (rank, features), its scale s, and whether it is trained."""

    weight: torch.Tensor
    scale: float
    trainable: bool


def add_adapter(
    model: nn.Module, specs: Mapping[str, ProjectionSpec], dropout: float, adapter_name: str
) -> None:
    """Add a new adapter with B = 0 to layers by name, and make it the active one.

    Layers with the same spec object share one projection, as far as they read their input alike.
    """
    freeze(model)
    warn_of_class_checks(model, specs)
    layers = replace_by_adapter_layers(model, specs)
    shared: dict[Hashable, SharedProjection] = {}
    for name, spec in specs.items():
        layer = layers[name]
        key = (spec, layer.view, layer.dtype, layer.device)
        if key not in shared:
            weight = spec.weight.to(layer.device, layer.dtype, copy=True)
            fresh = SharedProjection(weight, spec.scale, layer.view, trainable=spec.trainable)
            shared[key] = layer.find_equal_projection(fresh) or fresh
        layer.add(adapter_name, shared[key], dropout)
    set_adapter(model, adapter_name)


def check_new(model: nn.Module, adapter_name: str) -> None:
    """Check the name of a new adapter.

    Raises
    ------
    SettingError
        If it is in use, or torch cannot use it as the name of a parameter.
    """
    check_instance("adapter_name", adapter_name, str, "a string")
    taken = list_adapters(model)
    if (
        not adapter_name.isidentifier()
        or hasattr(nn.ModuleDict, adapter_name)
        or adapter_name in taken
    ):
        raise SettingError(
            f"expected a new name for an adapter, an identifier, got {adapter_name!r}; in use are "
            f"{taken} and the attributes of torch's modules"
        )


def detach(model: nn.Module, adapter_name: str | None = None) -> None:
    """Remove an adapter, or all; without adapters the model has its original layers again.

    A layer whose last adapter is merged keeps the merged weight: after `merge` and `detach` the
    original layers have the adapter in their weights. A warning says if other code of the model
    reads these, or if they were tied.

    Raises
    ------
    SettingError
        If the model has no such adapter.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import attach, detach, fit_projectors
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    >>> attach(model, fit_projectors(model, [torch.randn(8, 16)], rank=2, progress=False))
    >>> detach(model)
    >>> model
    Sequential(
      (0): Linear(in_features=16, out_features=4, bias=True)
    )
    """
    with atomic_change(model, structure=True):
        for name in (
            list_adapters(model)
            if adapter_name is None
            else [existing_adapter(model, adapter_name)]
        ):
            for _, layer in adapter_layers(model):
                if name in layer.lora_B:
                    layer.remove(name)
        bare = {name: m for name, m in adapter_layers(model) if not m.lora_B}
        warn_of_merged_weights(unwrap_model(model), bare)
        restore_base_layers(unwrap_model(model), bare.values())
        if not adapter_layers(model):
            unfreeze(unwrap_model(model))
            remove_pass_lock(unwrap_model(model))
