"""Which layers of a timm model get an adapter, family by family."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ipa_core.errors import IPAError
from ipa_timm.classifier import heads_of
from ipa_torch._layers.matmul_view import Convolution, view_of
from ipa_torch._layers.sizes import features_of
from ipa_torch._layers.targets import Targets, is_linear, select_layers
from ipa_torch._layers.unwrap import get_layer
from ipa_torch.errors import LayerError

_TRANSFORMER = (
    r"(.+\.)?blocks\.\d+\.(attn|mlp)\.(qkv|q_proj|k_proj|v_proj|proj|fc1|fc1_g|fc1_x|fc2|w12|w3)"
)

# With the parts of mixed convolutions, and the names of MobileNetV4.
_INVERTED = (
    r"blocks\.\d+\.\d+\.(conv(_pw|_pwl|_exp)?(\.\d+)?|pw_(exp|proj)\.conv|"
    r"attn\.(query|key|value|output)\.proj)|conv_head"
)

#: Regular expressions for whole names, by the module of `timm.models` that defines the family.
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
    """Return the names of the layers that `fit_projectors` learns for when it is not told.

    Transformers get all matrices of attention and MLP, ConvNeXt those of its MLPs, MLP-Mixer those
    of both its MLPs, EfficientNet its pointwise and full convolutions, ResNet the convolutions of
    its residual branches. Other families get every linear layer and every convolution outside of
    stem and head. Depth-wise convolutions are left out everywhere: a pair of rank r would cost r
    times what they cost themselves.

    Parameters
    ----------
    model : torch.nn.Module
        Of timm, or inherited from one of its classes.

    Examples
    --------
    >>> import timm
    >>> from ipa_timm import default_targets
    >>> default_targets(timm.create_model("test_vit"))[:4]
    ['blocks.0.attn.qkv', 'blocks.0.attn.proj', 'blocks.0.mlp.fc1', 'blocks.0.mlp.fc2']
    """
    pattern = FAMILIES.get(_family(model))
    matrices = _matrices(model)
    known = [name for name in matrices if pattern and re.fullmatch(pattern, name)]
    return known or matrices


def choose(model: nn.Module, targets: Targets | None) -> tuple[dict[str, int], dict[str, str]]:
    """Return the features of the layers that can have an adapter, and why the others cannot.

    Raises
    ------
    LayerError
        If there is no layer to choose from.
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
    heads = {id(module) for head in heads_of(model) for module in head.modules()}
    able: dict[str, int] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            layer = get_layer(model, name)
            if id(layer) in heads:
                raise LayerError("it belongs to the classifier, all of which is trained anyway")
            view_of(layer)
            able[name] = features_of(layer)
        except IPAError as error:
            refused[name] = str(error).removeprefix(f"layer {name!r}: ")
    return able, refused


def _family(model: nn.Module) -> str:
    """Return the module of timm that defines the model's class, or the class it inherits from."""
    for kind in type(model).__mro__:
        package, _, family = kind.__module__.rpartition(".")
        if package == "timm.models":
            return family
    return ""


def _matrices(model: nn.Module) -> list[str]:
    """Return the linear layers and convolutions outside of stem and head, none of them depth-wise.

    What lies within an `nn.MultiheadAttention` is among them, and is refused with the reason.
    """
    outside = {id(m) for head in heads_of(model) for m in head.modules()}
    outside |= {id(m) for name in _stems(model) for m in model.get_submodule(name).modules()}
    return [
        name
        for name, module in model.named_modules()
        if name
        and id(module) not in outside
        and (is_linear(module) or (isinstance(module, Convolution) and not _depth_wise(module)))
    ]


def _stems(model: nn.Module) -> Iterator[str]:
    """Yield what comes before the blocks: the first layer, as the config names it, and stems."""
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    names = {name for name, _ in model.named_modules()}
    for name in (first,) if isinstance(first, str) else first:
        if name in names:
            yield name
    yield from (name for name in ("patch_embed", "stem", "conv_stem") if name in names)


def _depth_wise(module: Convolution) -> bool:
    return module.groups > 1 and module.groups == module.in_channels
