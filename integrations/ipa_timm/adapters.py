"""A timm model with adapters beside its layers, and a head to train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

import ipa_torch
from ipa_core import Projector
from ipa_timm import batchnorm
from ipa_timm.classifier import head_parameters
from ipa_timm.fit import fit_projectors
from ipa_timm.fused_qkv import restore_fused_qkv_bias, use_separate_qkv_bias
from ipa_torch._adapters.model import Scaling
from ipa_torch._adapters.replace import adapter_layers
from ipa_torch._layers.targets import Targets
from ipa_torch._layers.unwrap import unwrap_model
from ipa_torch.projectors import LayerProjectors

_SEPARATED = "_ipa_timm_separated"


def adapt(
    model: nn.Module,
    loader: Iterable[Any],
    rank: int | Mapping[str, int],
    *,
    targets: Targets | None = None,
    scaling: Scaling = "energy",
    trainable: bool = False,
    dropout: float = 0.0,
    **learning: Any,
) -> LayerProjectors:
    r"""Learn projections from images and put them beside a model's layers, ready to be trained.

    Each layer W then computes :math:`W x + B \, s P x`, with B = 0 at first; a convolution does so
    for every patch x. What wants a gradient is B, the classifier, and P if ``trainable``.

    Parameters
    ----------
    model : torch.nn.Module
        Of timm; changed in place until `merge_and_unload` or `detach`.
    loader, rank, targets
        As for `fit_projectors`.
    scaling, trainable, dropout
        As for `attach`.
    **learning
        As for `fit_projectors`.

    Returns
    -------
    Projectors
        What was learned; ``missing`` names the layers that have no adapter, and why.

    Raises
    ------
    LayerError, ArrayTypeError, ShapeError, EmptyStreamError, RankError, NonFiniteError
        As for `fit_projectors`.
    SettingError
        If the model has adapters already, or a setting is out of range.

    Examples
    --------
    >>> import timm, torch
    >>> import ipa_timm
    >>> model = timm.create_model("test_vit", num_classes=2)
    >>> loader = [(torch.randn(2, 3, 160, 160), torch.tensor([0, 1]))]
    >>> projectors = ipa_timm.adapt(model, loader, rank=4, progress=False)
    >>> sum(p.requires_grad for p in model.parameters())  # a B for each layer, and the head's two
    26
    """
    projectors = fit_projectors(model, loader, rank, targets=targets, **learning)
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
    """Put learned projections beside the layers of a timm model, and let its classifier train.

    Until `merge_and_unload` or `detach`, attention that used the fused qkv weight directly calls
    the layer instead, and batch norms keep their running statistics in training mode, too.

    Parameters
    ----------
    model : torch.nn.Module
        Of timm; changed in place.
    projectors : mapping of str to Projector
        From layer names, as `fit_projectors` gives it.
    scaling : "energy" or float, default "energy"
        s, as for `ipa_torch.attach`.
    trainable : bool, default False
        Train P, too.
    dropout : float, default 0
        Probability with which entries of P x are dropped in training.

    Raises
    ------
    LayerError, ShapeError, SettingError
        As for `ipa_torch.attach`.

    Examples
    --------
    >>> import timm, torch
    >>> import ipa_timm
    >>> model = timm.create_model("test_vit", num_classes=2)
    >>> images = torch.randn(2, 3, 160, 160)
    >>> projectors = ipa_timm.fit_projectors(model, [images], rank=4, progress=False)
    >>> ipa_timm.attach(model, projectors.truncate(2), trainable=True)
    """
    model = unwrap_model(model)
    ipa_torch.attach(model, projectors, scaling=scaling, trainable=trainable, dropout=dropout)
    prepare_for_training(model)


def prepare_for_training(model: nn.Module) -> None:
    """Do to a model with adapters what timm's models need: qkv, batch norms, classifier."""
    names = [name for name, _ in adapter_layers(model)]
    model.__dict__.setdefault(_SEPARATED, []).extend(use_separate_qkv_bias(model, names))
    batchnorm.freeze_batchnorm_stats(model)
    for parameter in head_parameters(model).values():
        parameter.requires_grad_(True)


def merge_and_unload(model: nn.Module) -> None:
    """Compute the adapter into the weights and take it out: what is left is a plain timm model.

    Its state dict loads in a model that timm has made.

    Parameters
    ----------
    model : torch.nn.Module
        With an adapter, from `adapt`, `attach` or `load`.

    Raises
    ------
    LayerError
        If a layer is quantised; nothing is changed then.
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
    >>> again = timm.create_model("test_vit", num_classes=2)
    >>> again.load_state_dict(model.state_dict())
    <All keys matched successfully>
    """
    ipa_torch.merge(model)
    detach(model)


def detach(model: nn.Module) -> None:
    """Take the adapter out, and with it every trace; the classifier stays as it was trained.

    Parameters
    ----------
    model : torch.nn.Module
        With an adapter, or without.

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
    ipa_torch.detach(model)
    restore_fused_qkv_bias(model, model.__dict__.pop(_SEPARATED, []))
    batchnorm.unfreeze_batchnorm_stats(model)
