"""Adapters of a timm model: attach, merge and detach, with a trainable classifier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from torch import nn

import ipa_torch
from ipa_core import Projector
from ipa_timm import batchnorm
from ipa_timm.classifier import check_outside_classifier, classifier_parameters
from ipa_timm.fit import fit_projectors
from ipa_timm.fused_qkv import restore_fused_qkv_bias, use_separate_qkv_bias
from ipa_timm.targets import resolve_targets
from ipa_torch import FitOptions, LayerProjectors
from ipa_torch.extension import (
    Scaling,
    Targets,
    adapter_layers,
    atomic_change,
    check_attachable,
    unwrap_model,
)

_SEPARATE_QKV = "_ipa_timm_separate_qkv_bias"


def adapt(
    model: nn.Module,
    loader: Iterable[Any],
    rank: int | Mapping[str, int],
    *,
    targets: Targets | None = None,
    scaling: Scaling = "energy",
    trainable: bool = False,
    dropout: float = 0.0,
    **options: Unpack[FitOptions],
) -> LayerProjectors:
    r"""Fit projectors to images and attach an adapter to each layer, ready for training.

    Each layer W then computes :math:`W x + B \, s P x`, with B = 0 initially; a convolution does so
    for every patch x. Trainable parameters are B, the classifier, and P if ``trainable``.

    Parameters
    ----------
    model : torch.nn.Module
        A timm model; modified in place until `merge_and_unload` or `detach`.
    loader, rank, targets
        As for `fit_projectors`.
    scaling, trainable, dropout
        As for `attach`.
    **options
        As for `fit_projectors`.

    Returns
    -------
    LayerProjectors
        The fitted projectors; ``missing`` maps layers without an adapter to the reason.

    Raises
    ------
    LayerError, ArrayTypeError, ShapeError, EmptyStreamError, RankError, NonFiniteError
        As for `fit_projectors`.
    SettingError
        If the model already has this adapter, or a setting is out of range; before the fit.

    Examples
    --------
    >>> import timm, torch
    >>> import ipa_timm
    >>> model = timm.create_model("test_vit", num_classes=2)
    >>> loader = [(torch.randn(2, 3, 160, 160), torch.tensor([0, 1]))]
    >>> projectors = ipa_timm.adapt(model, loader, rank=4, progress=False)
    >>> sum(p.requires_grad for p in model.parameters())  # B of each layer; the head's two
    26
    """
    # Refused before the fit, which takes long.
    classifier_parameters(unwrap_model(model))
    supported, unsupported = resolve_targets(unwrap_model(model), targets)
    check_attachable(model, supported, scaling=scaling, trainable=trainable, dropout=dropout)
    names = supported.keys() | unsupported.keys()
    projectors = fit_projectors(
        model, loader, rank, targets=lambda name, module: name in names, **options
    )
    attach(model, projectors, scaling=scaling, trainable=trainable, dropout=dropout)
    return projectors


def attach(
    model: nn.Module,
    projectors: Mapping[str, Projector],
    *,
    scaling: Scaling = "energy",
    trainable: bool = False,
    dropout: float = 0.0,
) -> None:
    """Attach adapters to the layers of a timm model and make its classifier trainable.

    Until `merge_and_unload` or `detach`, attention modules that used the weight of a fused qkv
    directly call the layer instead, and batch norms keep their running statistics in training mode.

    Parameters
    ----------
    model : torch.nn.Module
        A timm model; modified in place.
    projectors : mapping of str to Projector
        By layer name, as `fit_projectors` returns it.
    scaling : "energy" or float, default "energy"
        Rule or value of s, as for `ipa_torch.attach`.
    trainable : bool, default False
        Train P as well as B.
    dropout : float, default 0
        Dropout probability of the entries of P x in training.

    Raises
    ------
    LayerError, ShapeError, SettingError
        As for `ipa_torch.attach`; a `LayerError` also if accelerate offloads the classifier, or a
        layer belongs to it.

    Examples
    --------
    >>> import timm, torch
    >>> import ipa_timm
    >>> model = timm.create_model("test_vit", num_classes=2)
    >>> images = torch.randn(2, 3, 160, 160)
    >>> projectors = ipa_timm.fit_projectors(model, [images], rank=4, progress=False)
    >>> ipa_timm.attach(model, projectors.truncate(2), trainable=True)
    """
    plain = unwrap_model(model)
    classifier_parameters(plain)  # refused before the model changes
    for name in projectors if isinstance(projectors, Mapping) else ():
        check_outside_classifier(plain, name)
    with atomic_change(model, structure=True):
        ipa_torch.attach(model, projectors, scaling=scaling, trainable=trainable, dropout=dropout)
        prepare_for_training(plain)


def prepare_for_training(model: nn.Module) -> None:
    """Prepare a model with adapters within a change: qkv bias, batch norms, classifier."""
    names = [name for name, _ in adapter_layers(model)]
    switched = model.__dict__.get(_SEPARATE_QKV, ())
    model.__dict__[_SEPARATE_QKV] = (*switched, *use_separate_qkv_bias(model, names))
    batchnorm.freeze_batchnorm_stats(model)
    for parameter in classifier_parameters(model).values():
        parameter.requires_grad_(True)


def merge_and_unload(model: nn.Module) -> None:
    """Merge the adapter into the weights and remove it, which leaves a plain timm model.

    The state dict then loads into a model from ``timm.create_model``.

    Parameters
    ----------
    model : torch.nn.Module
        With an adapter, from `adapt`, `attach` or `load_adapter`.

    Raises
    ------
    LayerError
        If a layer is quantized; the model is left unchanged then.
    SettingError
        If the model has no adapter.

    Examples
    --------
    >>> import timm, torch
    >>> import ipa_timm
    >>> model = timm.create_model("test_vit", num_classes=2)
    >>> images = torch.randn(2, 3, 160, 160)
    >>> projectors = ipa_timm.adapt(model, [images], rank=4, progress=False)
    >>> ipa_timm.merge_and_unload(model)
    >>> plain = timm.create_model("test_vit", num_classes=2)
    >>> plain.load_state_dict(model.state_dict())
    <All keys matched successfully>
    """
    with atomic_change(model, structure=True):
        ipa_torch.merge(model)
        detach(model)


def detach(model: nn.Module) -> None:
    """Remove the adapter and all changes that `attach` made; the classifier stays as trained.

    Parameters
    ----------
    model : torch.nn.Module
        With or without an adapter.

    Examples
    --------
    >>> import timm, torch
    >>> import ipa_timm
    >>> model = timm.create_model("test_vit", num_classes=2)
    >>> images = torch.randn(2, 3, 160, 160)
    >>> before = model.eval()(images)
    >>> projectors = ipa_timm.adapt(model, [images], rank=4, progress=False)
    >>> ipa_timm.detach(model)
    >>> torch.equal(model(images), before)
    True
    """
    model = unwrap_model(model)
    with atomic_change(model, structure=True):
        ipa_torch.detach(model)
        restore_fused_qkv_bias(model, model.__dict__.pop(_SEPARATE_QKV, ()))
        batchnorm.unfreeze_batchnorm_stats(model)
