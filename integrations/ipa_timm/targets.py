"""Default target layers of timm models, by family."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ipa_core.errors import IPAError
from ipa_timm.classifier import check_outside_classifier, modules_of_classifier
from ipa_torch import LayerError, select_layers
from ipa_torch.extension import (
    Convolution,
    Targets,
    features_of,
    get_layer,
    is_linear,
    unwrap_model,
    view_of,
)

_TRANSFORMER = (
    r"(.+\.)?blocks\.\d+\.(attn|mlp)\.(qkv|q_proj|k_proj|v_proj|proj|fc1|fc1_g|fc1_x|fc2|w12|w3)"
)

# Includes the parts of mixed convolutions, and the names in MobileNetV4.
_INVERTED = (
    r"blocks\.\d+\.\d+\.(conv(_pw|_pwl|_exp)?(\.\d+)?|pw_(exp|proj)\.conv|"
    r"attn\.(query|key|value|output)\.proj)|conv_head"
)

#: Regular expressions of whole layer names, by the module of `timm.models` with the family.
FAMILIES = {
    "beit": _TRANSFORMER,
    "convnext": r"stages\.\d+\.blocks\.\d+\.mlp\.fc[12]",
    "deit": _TRANSFORMER,
    "efficientnet": _INVERTED,
    "eva": _TRANSFORMER,
    "mlp_mixer": r"blocks\.\d+\.(mlp_(tokens|channels)\.(fc[12]|gate\.proj)|linear_tokens)",
    "mobilenetv3": _INVERTED,
    "resnet": r"layer\d\.\d+\.conv[123]",
    "swin_transformer": _TRANSFORMER,
    "swin_transformer_v2": _TRANSFORMER,
    "vision_transformer": _TRANSFORMER,
    "vision_transformer_relpos": _TRANSFORMER,
}


def default_targets(model: nn.Module) -> list[str]:
    """Return the names of the default target layers of a timm model.

    Transformers: all linear layers of attention and MLPs. ConvNeXt and MLP-Mixer: those of the
    MLPs. EfficientNet: pointwise and full convolutions. ResNet: convolutions of the residual
    branches. Other families: every linear layer and convolution outside of stem and head.
    Depthwise convolutions are always excluded, as an adapter of rank r would cost r times as much
    as the layer.

    Parameters
    ----------
    model : torch.nn.Module
        A timm model, or an instance of a subclass.

    Raises
    ------
    SettingError
        If the model is no module.

    Examples
    --------
    >>> import timm
    >>> from ipa_timm import default_targets
    >>> default_targets(timm.create_model("test_vit"))[:4]
    ['blocks.0.attn.qkv', 'blocks.0.attn.proj', 'blocks.0.mlp.fc1', 'blocks.0.mlp.fc2']
    """
    model = unwrap_model(model)
    pattern = FAMILIES.get(_family(model))
    layers = _matmul_layers(model)
    known = [name for name in layers if pattern and re.fullmatch(pattern, name)]
    return known or layers


def resolve_targets(
    model: nn.Module, targets: Targets | None
) -> tuple[dict[str, int], dict[str, str]]:
    """Return the features of supported target layers, and the reasons for unsupported ones.

    Raises
    ------
    LayerError
        If the model has no candidate layer.
    """
    if targets is None:
        names = default_targets(model)
        if not names:
            raise LayerError(
                f"expected a model with linear layers or convolutions, got {type(model).__name__} "
                "with none; name the layers with targets"
            )
    else:
        names = list(select_layers(model, targets))
    supported: dict[str, int] = {}
    unsupported: dict[str, str] = {}
    for name in names:
        try:
            layer = get_layer(model, name)
            check_outside_classifier(model, name)
            view_of(layer)
            supported[name] = features_of(layer)
        except IPAError as error:
            unsupported[name] = str(error).removeprefix(f"layer {name!r}: ")
    return supported, unsupported


def _family(model: nn.Module) -> str:
    """Return the module of `timm.models` that defines the model's class or its base class."""
    for kind in type(model).__mro__:
        package, _, family = kind.__module__.rpartition(".")
        if package == "timm.models":
            return family
    return ""


def _matmul_layers(model: nn.Module) -> list[str]:
    """Return linear layers and non-depthwise convolutions outside of stem and head.

    Layers inside an `nn.MultiheadAttention` are included; `resolve_targets` rejects them with the
    reason.
    """
    outside = modules_of_classifier(model)
    outside |= {id(m) for name in _stems(model) for m in model.get_submodule(name).modules()}
    return [
        name
        for name, module in model.named_modules()
        if name
        and id(module) not in outside
        and (is_linear(module) or (isinstance(module, Convolution) and not _is_depthwise(module)))
    ]


def _stems(model: nn.Module) -> Iterator[str]:
    """Yield names of modules before the blocks: the config's first layer, and stems."""
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    names = {name for name, _ in model.named_modules()}
    for name in (first,) if isinstance(first, str) else first:
        if name in names:
            yield name
    yield from (name for name in ("patch_embed", "stem", "conv_stem") if name in names)


def _is_depthwise(module: Convolution) -> bool:
    return module.groups > 1 and module.groups == module.in_channels
