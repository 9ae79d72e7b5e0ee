"""Try one small model of each family that timm has: python -m benchmarks.timm_families.

Writes ``results/timm_families.md``: which families work, which are refused, and why. The figures
say how little `ipa_timm` changes where it should change nothing, and how much where it should.
"""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import benchmarks.vision  # noqa: F401  isort: skip  (before timm)
import timm
import torch
from timm.models import list_models, list_modules
from torch import nn

import ipa_timm
from benchmarks import record
from ipa_timm.classifier import classifier_parameters
from ipa_torch import LayerError, LayerProjectors
from ipa_torch.extension import adapter_layers

CLASSES = 3
RANK = 4
#: Tried first, for the sake of time; models of one size only, and where so little is left of an
#: image that attention has nothing to choose from, are given what their data config says.
PIXELS = 128
#: Families without a small model, and what makes one.
SHORTER = {family: {"depth": 2} for family in ("deepseek_vit", "gemma4_vit", "qwen3_vit")}
#: Relative difference between outputs that are said to be equal.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Found:
    """Result of the check of a model."""

    model: str
    layers: int
    missing: dict[str, str]
    #: Largest differences between outputs, relative to the largest output.
    begun: float = 0.0  # the adapted model with B = 0, and the base
    effect: float = 0.0  # the adapted model with B at random, and the base
    silent: int = 0  # layers whose B has no gradient
    merged: float = 0.0  # the merged model, and the adapted one
    stock: float = 0.0  # a model that timm makes from the merged state dict, and the adapted one
    error: str = ""

    @property
    def works(self) -> bool:
        """True if outputs start unchanged, every B has an effect, and merging is exact."""
        return (
            self.layers > 0
            and not self.error
            and not self.silent
            and max(self.begun, self.merged, self.stock) < TOLERANCE
            and self.effect > 100 * TOLERANCE
        )

    @property
    def verdict(self) -> str:
        """Verdict in one word."""
        if self.works:
            return "works"
        return "refused" if not self.layers and self.missing and not self.error else "FAILS"


def families() -> dict[str, list[str]]:
    """Return the models of timm by the module that defines them."""
    return {
        family: list_models(module=family)
        for family in list_modules()
        if list_models(module=family)
    }


def smallest(names: list[str]) -> tuple[str, int]:
    """Return the model with the fewest parameters, and their number; nothing is allocated."""
    sizes = {}
    for name in names:
        with torch.device("meta"):
            try:
                model = timm.create_model(name, num_classes=CLASSES)
            except (NotImplementedError, RuntimeError):  # that reads numbers while it is made
                continue
        sizes[name] = sum(p.numel() for p in model.parameters())
    name = min(sizes, key=sizes.__getitem__)
    return name, sizes[name]


def build(name: str, **options: Any) -> nn.Module:
    """Return a model at random, every part of which has an effect."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, **options).eval()
    for parameter in model.parameters():
        # Residual branches begin with a scale of zero or of 1e-6, in many families.
        if parameter.ndim and parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.1)
    return model


def images(model: nn.Module, pixels: int | None = None) -> torch.Tensor:
    """Return two images at random, of the size in the model's data config if not told."""
    channels, *size = model.pretrained_cfg["input_size"]
    size = [pixels, pixels] if pixels else size
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def check(
    name: str, pixels: int | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> Found:
    """Adapt a model, change B, merge, and load the result in a new model of timm's."""
    model = build(name, **options).to(dtype)
    x = images(model, pixels).to(dtype)
    base = _outputs(model, x)
    projectors = _adapted(model, x)
    missing = dict(projectors.missing)
    if not len(projectors):
        return Found(name, 0, missing)
    begun = _difference(_outputs(model, x), base)
    silent = _without_gradient(model, x)
    _randomize(model)
    adapted = _outputs(model, x)
    ipa_timm.merge_and_unload(model)
    merged = _outputs(model, x)
    stock = timm.create_model(name, num_classes=CLASSES, **options).to(dtype).eval()
    stock.load_state_dict(model.state_dict())
    return Found(
        name,
        len(projectors),
        missing,
        begun=begun,
        effect=_difference(adapted, base),
        silent=silent,
        merged=_difference(merged, adapted),
        stock=_difference(_outputs(stock, x), adapted),
    )


def _adapted(model: nn.Module, x: torch.Tensor) -> LayerProjectors:
    try:
        return ipa_timm.adapt(
            model, [(x, torch.zeros(len(x)))], RANK, on_missing="ignore", progress=False
        )
    except LayerError as error:
        return LayerProjectors({}, missing={"all": str(error)})


def _randomize(model: nn.Module) -> None:
    """Give B, and the head, some trained values."""
    generator = torch.Generator().manual_seed(2)
    for _, layer in adapter_layers(model):
        lift = layer.lora_B["default"]
        weight = layer.base_layer.weight
        # A change of a tenth of the weight, over P with orthonormal rows and its scale.
        scale = (
            0.1 * weight.norm() / (lift.numel() ** 0.5 * float(layer.projection("default").scale))
        )
        with torch.no_grad():
            lift.copy_(scale * torch.randn(lift.shape, generator=generator))
    for parameter in classifier_parameters(model).values():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _without_gradient(model: nn.Module, x: torch.Tensor) -> int:
    output = _tensor(model(x))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * weights).sum().backward()
    lora_B = [layer.lora_B["default"] for _, layer in adapter_layers(model)]
    return sum(lift.grad is None or not lift.grad.any() for lift in lora_B)


@torch.no_grad()
def _outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _tensor(model(x))


def _tensor(output: Any) -> torch.Tensor:
    """Return all that a model gives, as one tensor."""
    if isinstance(output, torch.Tensor):
        return output.flatten(1)
    values = output.values() if isinstance(output, dict) else output
    return torch.cat([_tensor(value) for value in values], dim=1)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest output."""
    return float((one - other).abs().max() / torch.maximum(one.abs(), other.abs()).max())


def walk() -> Iterator[tuple[str, Found]]:
    for family, names in families().items():
        name, size = smallest(names)
        # A model at random may blow up rounding as it does any change of its input; in float64 it
        # is seen whether it is that.
        for pixels, dtype in (
            (PIXELS, torch.float32),
            (None, torch.float32),
            (None, torch.float64),
        ):
            try:
                found = check(name, pixels, dtype, **SHORTER.get(family, {}))
            except Exception as error:  # whatever it is, it is a finding
                found = Found(name, 0, {}, error=f"{type(error).__name__}: {error}")
            if found.works:
                break
        print(f"{family}: {name} ({size:,}) {found.verdict} {found.error}", flush=True)
        yield family, found


def report(found: dict[str, Found]) -> str:
    """Return the table of all families."""
    rows = [
        [
            family,
            f"`{one.model}`",
            one.verdict,
            str(one.layers),
            f"{one.effect:.1g}" if one.layers else "-",
            f"{max(one.begun, one.merged, one.stock):.0e}" if one.layers else "-",
            _reasons(one),
        ]
        for family, one in found.items()
    ]
    works = sum(one.works for one in found.values())
    refused = sum(one.verdict == "refused" for one in found.values())
    header = ["family", "model", "verdict", "layers", "effect", "error", "refused layers"]
    return (
        f"timm {timm.__version__}: {len(found)} families, {works} work, {refused} refused, "
        f"{len(found) - works - refused} fail.\n\n{record.table(header, rows)}\n"
    )


def _reasons(found: Found) -> str:
    if found.error:
        return found.error.replace("|", "/").replace("\n", " ")[:200]
    counts: dict[str, int] = {}
    for reason in found.missing.values():
        counts[reason] = counts.get(reason, 0) + 1
    if not found.layers:
        return "; ".join(counts).replace("\n", " ")
    return "; ".join(f"{count}: {reason}" for reason, count in counts.items())


def main() -> int:
    """Walk, and write; the exit status is the number of families that fail."""
    warnings.simplefilter("ignore")
    found = dict(walk())
    (record.FOLDER / "timm_families.md").write_text(report(found))
    return sum(one.verdict == "FAILS" for one in found.values())


if __name__ == "__main__":
    sys.exit(main())
