"""Tiny random models of all families of transformers, and inputs for them."""

import contextlib
import importlib
import inspect
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.moe_models import OWN, SIZES, model_classes

Kind = type[transformers.PreTrainedModel]
#: Endings of class names, the preferred one first.
PREFERRED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "Model", "")
#: Parameters of the largest model that is built, and of the largest change of its sizes.
LARGEST = 60_000_000
LAYERS = re.compile(r"(num_\w*(layers|blocks)|\w*_layers|n_layers?|depth)$")
NO_FAMILIES = ("auto", "deprecated", "timm_backbone", "timm_wrapper")
#: Settings that are no widths.
FIXED = re.compile(
    r"image_size|patch|stride|kernel|dilation|window|rate|_id$|channels$|dtype|theta"
)
VARIANTS = ((2, 16), (2, 8), (2, 32), (4, 16), (2, 4), (2, 1), (6, 16))


def families(names: Collection[str] | None = None) -> dict[str, list[Kind]]:
    """Return the model classes of each family of transformers, or of those named, best first.

    Modules that need a package that is not installed are left out.
    """
    folder = Path(transformers.__file__).parent / "models"
    found: dict[str, list[Kind]] = {}
    for path in sorted(folder.glob("*/modeling_*.py")):
        if path.parent.name in NO_FAMILIES or (names and path.parent.name not in names):
            continue
        name = f"transformers.models.{path.parent.name}.{path.stem}"
        with contextlib.suppress(ImportError):  # torchaudio, for example
            kinds = _own_models(importlib.import_module(name))
            found.setdefault(path.parent.name, []).extend(kinds)
    return {family: sorted(kinds, key=_preference) for family, kinds in found.items() if kinds}


def _own_models(module: Any) -> list[Kind]:
    """Return the models of a module that have a forward pass of their own."""
    return [
        kind
        for kind in model_classes(module)
        if "PreTrained" not in kind.__name__
        and kind.forward is not transformers.PreTrainedModel.forward
    ]


def _preference(kind: Kind) -> tuple[int, int]:
    name = kind.__name__
    return next(rank for rank, end in enumerate(PREFERRED) if name.endswith(end)), len(name)


def builds(family: str, kind: Kind) -> Iterator[transformers.PreTrainedModel]:
    """Yield small models of a class, in different sizes, as far as they can be made."""
    for config in _configs(family, kind):
        with contextlib.suppress(Exception):  # sizes that do not fit together
            with torch.device("meta"):
                size = sum(p.numel() for p in kind(config).parameters())
            if size <= LARGEST:
                yield build(kind, config)


def build(kind: Kind, config: Any) -> transformers.PreTrainedModel:
    """Return a random model without parameters at zero; the same at every call."""
    torch.manual_seed(0)
    model = kind(config).float().eval()
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3 or not parameter.isfinite().all():
            nn.init.normal_(parameter, std=0.1)
    return model


def _configs(family: str, kind: Kind) -> Iterator[Any]:
    with contextlib.suppress(Exception):
        known = kind.config_class().to_dict()
        sizes = {name: size for name, size in SIZES.items() if name in known}
        if "head_dim" in known and "qk_rope_head_dim" not in known:
            sizes["head_dim"] = 8
        yield kind.config_class(**sizes | OWN.get(family, {}))
    for layers, divisor in VARIANTS:
        with contextlib.suppress(Exception):
            yield kind.config_class.from_dict(
                _smaller(kind.config_class().to_dict(), layers, divisor)
            )


def _smaller(settings: dict[str, Any], layers: int, divisor: int) -> dict[str, Any]:
    """Return settings with few layers, and with sizes from 128 on divided."""
    counts = {
        value for name, value in settings.items() if LAYERS.search(name) and isinstance(value, int)
    }
    smaller: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            smaller[name] = _smaller(value, layers, divisor)
        elif isinstance(value, list) and len(value) in counts and len(value) > layers:
            smaller[name] = value[:layers]
        elif isinstance(value, bool) or not isinstance(value, int):
            smaller[name] = value
        elif LAYERS.search(name):
            smaller[name] = min(value, layers)
        elif value >= 128 and not FIXED.search(name):
            smaller[name] = value // divisor
        else:
            smaller[name] = value
    return smaller


def batches(model: transformers.PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Yield inputs that may suit a model, by the names of its forward's parameters."""
    names = inspect.signature(model.forward).parameters
    config = model.config
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(1)
    highest = min(60, getattr(text, "vocab_size", None) or 60)
    ids = torch.randint(3, max(4, highest), (2, 12), generator=generator)
    given: dict[str, torch.Tensor] = {}
    for name in ("input_ids", "decoder_input_ids"):
        if name in names:
            given[name] = ids
    if "attention_mask" in names and "input_ids" in names:
        given["attention_mask"] = torch.ones_like(ids)
    if given:
        yield given
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", None) or 3
    size = getattr(vision, "image_size", None) or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    frames = getattr(vision, "num_frames", None) or 2
    image = torch.randn(2, channels, height, width, generator=generator)
    mels = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
    wide = torch.randn(2, 3000, mels, generator=generator)
    samples = torch.randn(2, 16_000, generator=generator)
    candidates = {
        "pixel_values": [image, image[:, None].expand(-1, frames, -1, -1, -1)],
        "pixel_values_videos": [image[:, None].expand(-1, frames, -1, -1, -1)],
        "input_features": [wide.mT, wide[:, :200].mT, wide[:, :200], wide.mT[:, None]],
        "input_values": [samples, samples[:, None], wide[:, :1024], wide[:, :200]],
        "inputs_embeds": [torch.randn(2, 12, getattr(text, "hidden_size", None) or 32)],
        "past_values": [torch.randn(2, 64, generator=generator)],
    }
    for name, values in candidates.items():
        for value in values if name in names else ():
            yield given | {name: value}
            if given:
                yield {name: value}


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return all floating outputs as one vector."""
    torch.manual_seed(0)  # some models draw numbers in evaluation mode
    return torch.cat([x.flatten() for x in _tensors(model(**batch))])


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output.float()
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
