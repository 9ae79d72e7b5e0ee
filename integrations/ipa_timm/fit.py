"""Fit projectors of a timm model's layers to images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Unpack

from torch import nn

import ipa_timm.same_padding  # noqa: F401  (registers the view of Conv2dSame)
import ipa_torch
from ipa_timm.fused_qkv import separate_qkv_bias
from ipa_timm.preprocessing import images_of, preprocess, valid_patches
from ipa_timm.targets import resolve_targets
from ipa_torch import FitOptions, LayerProjectors
from ipa_torch.extension import (
    OnMissing,
    Targets,
    check_choice,
    report_missing,
    resolve_rank,
    unwrap_model,
)


def fit_projectors(
    model: nn.Module,
    loader: Iterable[Any],
    rank: int | Mapping[str, int],
    *,
    targets: Targets | None = None,
    on_missing: OnMissing = "warn",
    **options: Unpack[FitOptions],
) -> LayerProjectors:
    r"""Fit a projector to the inputs of each target layer of a timm model.

    Inputs of a convolution are its patches, at all positions of all images; the groups of a grouped
    convolution share P. A fused qkv layer has one input, hence one P.

    Parameters
    ----------
    model : torch.nn.Module
        A timm model. Weights, ``requires_grad`` and random states stay unchanged.
    loader : iterable
        A loader of timm, a ``DataLoader`` or a list. Its batches are ``(images, target)``, images,
        or mappings with ``image``, ``images`` or ``pixel_values``. uint8 images are normalized by
        the model's data config, floating ones are used unchanged; see `preprocess`.
    rank : int or mapping of str to int
        Rank of P, for all layers or by name; at most the number of features of the layer.
    targets : list of str, str, callable, optional
        Target layers, as for `ipa_torch.select_layers`; by default `default_targets`.
    on_missing : {"warn", "raise", "ignore"}, default "warn"
        Action for layers that cannot have an adapter; `LayerProjectors.missing` has the reasons.
    **options
        As for `ipa_torch.fit_projectors`; see `ipa_torch.FitOptions`.

    Returns
    -------
    LayerProjectors
        Projectors by layer name.

    Raises
    ------
    LayerError
        If no target layer is usable, or a layer has no projector (``on_missing="raise"``).
    ArrayTypeError, ShapeError
        If a batch contains no images.
    EmptyStreamError
        If the loader yields no batch.
    RankError, NonFiniteError
        If a rank is out of range or an input not finite; the message names the layer.

    Notes
    -----
    Cost in addition to the forward passes, for n rows of d features: O((8r + 32) n d) operations
    and O((8r + 32) d) numbers for each distinct input. In a convolution, n is at most
    ``max_patches`` times the number of groups for each batch.

    Examples
    --------
    >>> import timm, torch
    >>> from ipa_timm import fit_projectors
    >>> model = timm.create_model("test_vit", num_classes=2)
    >>> loader = [(torch.randn(2, 3, 160, 160), torch.tensor([0, 1]))]
    >>> projectors = fit_projectors(model, loader, rank=4, progress=False)
    >>> projectors["blocks.0.attn.qkv"].features
    64
    """
    check_choice("on_missing", on_missing, OnMissing)
    model = unwrap_model(model)
    supported, unsupported = resolve_targets(model, targets)
    if not supported:
        report_missing(LayerProjectors({}, missing=unsupported), on_missing)
    if options.get("forward") is None:
        options["forward"] = _forward
    options.setdefault("row_weights", partial(valid_patches, model))
    with separate_qkv_bias(model, supported):
        fitted = ipa_torch.fit_projectors(
            model,
            loader,
            _ranks(supported, rank),
            targets=lambda name, module: name in supported,
            on_missing="ignore",
            **options,
        )
    missing = {**unsupported, **fitted.missing}
    projectors = LayerProjectors(
        fitted, missing=missing, stopped=fitted.stopped, passes=fitted.passes
    )
    report_missing(projectors, on_missing)
    return projectors


def _ranks(features: Mapping[str, int], rank: int | Mapping[str, int]) -> dict[str, int]:
    """Return the rank of each layer, limited to its number of features."""
    requested = {name: resolve_rank(name, rank) for name in features}
    return {
        name: min(value, features[name]) if isinstance(value, int) else value
        for name, value in requested.items()
    }


def _forward(model: nn.Module, batch: Any) -> object:
    return model(preprocess(model, images_of(batch)))
