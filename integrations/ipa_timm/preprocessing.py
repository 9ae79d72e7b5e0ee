"""Preprocessing of image batches into model inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F

import ipa_timm.same_padding  # noqa: F401  (registers the view of Conv2dSame)
from ipa_core.errors import ArrayTypeError, ShapeError
from ipa_core.settings import check_instance
from ipa_torch.extension import device_of, on_device, unwrap_model

#: Keys of the images in batches that are mappings.
IMAGE_KEYS = ("image", "images", "pixel_values", "input", "x")


def images_of(batch: Any) -> Any:
    """Return the images of a batch: ``(images, target)``, images alone, or a mapping.

    A mapping with ``patches``, as NaFlex loaders yield, is returned unchanged.

    Raises
    ------
    ArrayTypeError
        If the batch has no images.
    """
    if isinstance(batch, torch.Tensor):
        return batch
    if isinstance(batch, (tuple, list)) and batch:
        return images_of(batch[0])
    if isinstance(batch, Mapping):
        if "patches" in batch:
            return batch
        for name in IMAGE_KEYS:
            if name in batch:
                return images_of(batch[name])
    received = (
        f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    )
    raise ArrayTypeError(
        f"expected a batch of images, (images, target), or a mapping with one of {IMAGE_KEYS}, got "
        f"{received}; change what the loader yields"
    )


def preprocess(model: nn.Module, images: Any) -> Any:
    r"""Return images as model inputs, on the model's device and in its dtype.

    Floating images are assumed to be normalized, as timm's loaders yield them. uint8 images are
    scaled to [0, 1], resized to the size in the model's data config, and normalized with its mean
    and standard deviation.

    Parameters
    ----------
    model : torch.nn.Module
    images : torch.Tensor of shape (batch, channels, height, width), or mapping
        Of floating dtype or uint8. In a mapping with ``patches``, a NaFlex batch, floating tensors
        are cast, and values that are no tensors stay as they are.

    Raises
    ------
    ArrayTypeError, ShapeError
        If the dtype is neither floating nor uint8, or the shape not that of an image batch; of
        uint8 images also the number of channels, for which the data config has means.
    SettingError
        If the model is no module.

    Examples
    --------
    >>> import timm, torch
    >>> from ipa_timm import preprocess
    >>> model = timm.create_model("test_vit", num_classes=2)
    >>> preprocess(model, torch.zeros(1, 3, 40, 40, dtype=torch.uint8)).shape
    torch.Size([1, 3, 160, 160])
    """
    model = unwrap_model(model)
    device = device_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if isinstance(images, Mapping):
        check_instance(
            "the patches of a mapping",
            images.get("patches"),
            torch.Tensor,
            "a tensor",
            cure="pass a NaFlex batch, or the images themselves",
            error=ArrayTypeError,
        )
        return {
            key: value.to(dtype) if _is_floating(value) else value
            for key, value in on_device(images, device).items()
        }
    form = "a tensor or a mapping of NaFlex patches"
    check_instance("images", images, torch.Tensor, form, error=ArrayTypeError)
    if images.ndim != 4:
        raise ShapeError(
            f"expected images of shape (batch, channels, height, width), got {tuple(images.shape)}"
        )
    images = on_device(images, device)
    if images.dtype == torch.uint8:
        images = _normalize(images.float() / 255, resolve_model_data_config(model))
    elif not images.is_floating_point():
        raise ArrayTypeError(f"expected images that are floating or uint8, got {images.dtype}")
    return images.to(dtype)


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _normalize(images: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    channels = len(config["mean"])
    if images.shape[1] != channels or 0 in images.shape[2:]:
        raise ShapeError(
            f"expected uint8 images of {channels} channels, as many as the model's data config has "
            f"means, and of at least one pixel, got shape {tuple(images.shape)}; convert them, or "
            "pass normalized floating images"
        )
    size = tuple(config["input_size"][-2:])
    if tuple(images.shape[-2:]) != size:
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    mean, deviation = (
        torch.tensor(config[key], device=images.device)[:, None, None] for key in ("mean", "std")
    )
    return (images - mean) / deviation


def valid_patches(model: nn.Module, batch: Any) -> list[torch.Tensor] | None:
    """Return the padding masks of a NaFlex batch, None for other batches.

    They are those of the patches, and of the patches behind the model's class and register tokens.

    Raises
    ------
    ShapeError
        If ``patch_valid`` is no tensor of shape (batch, patches).
    """
    images = images_of(batch)
    valid = images.get("patch_valid") if isinstance(images, Mapping) else None
    if valid is None:
        return None
    shape = tuple(valid.shape) if isinstance(valid, torch.Tensor) else None
    if shape is None or len(shape) != 2:
        raise ShapeError(
            "expected patch_valid to be a tensor of shape (batch, patches), got "
            f"{type(valid).__name__ if shape is None else f'one of shape {shape}'}; take it from a "
            "NaFlex loader, or leave it out if no patch is padding"
        )
    prefix = valid.new_ones(len(valid), getattr(model, "num_prefix_tokens", 0))
    return [valid, torch.cat([prefix, valid], dim=1)]
