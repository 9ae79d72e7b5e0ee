"""Learning projectors for a timm model from its images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

import ipa_timm.same_padding  # noqa: F401  (teaches ipa_torch timm's convolutions)
import ipa_torch
from ipa_timm.fused_qkv import separate_qkv_bias
from ipa_timm.preprocessing import images_of, preprocess
from ipa_timm.targets import choose
from ipa_torch._fit.fit import OnMissing, report
from ipa_torch._layers.targets import Targets
from ipa_torch._layers.unwrap import unwrap_model
from ipa_torch.errors import check_choice
from ipa_torch.projectors import LayerProjectors, resolve_rank


def fit_projectors(
    model: nn.Module,
    loader: Iterable[Any],
    rank: int | Mapping[str, int],
    *,
    targets: Targets | None = None,
    on_missing: OnMissing = "warn",
    **learning: Any,
) -> LayerProjectors:
    r"""Learn, for layers of a timm model, the projections from which their inputs are best rebuilt.

    A convolution's inputs are its patches, over all places of all images; one with groups has one
    P for all of them. A fused qkv has one input, hence one P.

    Parameters
    ----------
    model : torch.nn.Module
        Of timm. Its weights, flags and random states stay as they are.
    loader : iterable
        timm's loaders, a ``DataLoader``, a list: batches ``(images, target)``, images alone, or
        mappings with ``image``, ``images`` or ``pixel_values``. Floating images are taken as they
        are, bytes by the model's data config; see `preprocess`.
    rank : int or mapping of str to int
        Rows of P, for all layers or by name; a layer with fewer features gets as many as these.
    targets : list of str, str, callable, optional
        Which layers, as for `ipa_torch.select_layers`; by default `default_targets`.
    on_missing : {"warn", "raise", "ignore"}, default "warn"
        What to do about layers that cannot have an adapter; `LayerProjectors.missing` says why.
    **learning
        ``learner``, ``max_patches``, ``max_rows``, ``max_batches``, ``max_seconds``,
        ``tolerance``, ``forward``, ``on_error``, ``progress``: as for `ipa_torch.fit_projectors`.

    Returns
    -------
    Projectors
        From layer names to projectors.

    Raises
    ------
    LayerError
        If there is no layer to learn for, or one is missing (``on_missing="raise"``).
    ArrayTypeError, ShapeError
        If a batch has no images.
    EmptyStreamError
        If there is no batch.
    RankError, NonFiniteError
        If a rank or a layer's input is unfit; the message names the layer.

    Notes
    -----
    Cost beside the forward passes, for n rows of d features: O((8r + 32) n d) operations and O((8r
    + 32) d) numbers for each distinct input; n is at most ``max_patches`` a batch in a convolution,
    times its groups.

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
    able, refused = choose(model, targets)
    if not able:
        report(LayerProjectors({}, missing=refused), on_missing)
    learning.setdefault("forward", _forward)
    learning.setdefault("row_weights", _valid_patches)
    with separate_qkv_bias(model, able):
        learned = ipa_torch.fit_projectors(
            model,
            loader,
            _ranks(able, rank),
            targets=lambda name, module: name in able,
            on_missing="ignore",
            **learning,
        )
    missing = {**refused, **learned.missing}
    projectors = LayerProjectors(learned, missing=missing, stopped=learned.stopped)
    report(projectors, on_missing)
    return projectors


def _ranks(able: Mapping[str, int], rank: int | Mapping[str, int]) -> dict[str, int]:
    return {
        name: min(own, features) if isinstance(own := resolve_rank(name, rank), int) else own
        for name, features in able.items()
    }


def _forward(model: nn.Module, batch: Any) -> object:
    return model(preprocess(model, images_of(batch)))


def _valid_patches(batch: Any) -> Any:
    """Return the padding mask of a NaFlex batch; other images have none."""
    images = images_of(batch)
    return images.get("patch_valid") if isinstance(images, Mapping) else None
