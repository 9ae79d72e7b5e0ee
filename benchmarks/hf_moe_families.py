"""Adapt tiny models of all families with fused experts: python -m benchmarks.hf_moe_families.

Writes ``results/hf_moe_families.md``: the families of transformers that work, and those that are
refused, with the reason. In its columns, ``effect`` is the change of outputs by a random B, and
``error`` the largest difference of outputs that should be equal, both relative to the largest
output; ``export`` is the form in which `ipa_hf.export_lora` writes the adapter.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import nn

import ipa_hf
from benchmarks import record
from benchmarks.moe_models import build, families, model_class
from ipa_core import ExactCovariance
from ipa_core.errors import SettingError
from ipa_hf.lora_layers import lora_layers
from ipa_torch import LayerError

RANK = 4
#: Relative difference of equal outputs, at most.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Found:
    """Result of a model."""

    model: str
    parameters: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    #: Largest differences between outputs, relative to the largest output.
    collected: float = 0.0  # the model while its experts' inputs are collected, and the model
    begun: float = 0.0  # the adapted model with B = 0, and the model
    effect: float = 0.0  # the adapted model with B at random, and the model
    silent: int = 0  # parameters whose B has no gradient
    merged: float = 0.0  # the merged model, and the adapted one
    stock: float = 0.0  # the model with the saved adapter as PEFT loads it, and the adapted one
    export: str = "-"
    error: str = ""

    @property
    def largest_difference(self) -> float:
        """Largest difference of outputs that should be equal."""
        return max(self.collected, self.begun, self.merged, self.stock)

    @property
    def works(self) -> bool:
        """True if adapters start without effect, then have one, merge exactly and load again."""
        return (
            self.parameters > 0
            and not self.error
            and not self.silent
            and self.largest_difference < TOLERANCE
            and self.effect > 100 * TOLERANCE
        )

    @property
    def verdict(self) -> str:
        """Verdict in a word."""
        if self.works:
            return "works"
        return "refused" if self.missing and not self.parameters and not self.error else "FAILS"


def fused_names(model: nn.Module) -> list[str]:
    """Return names of the parameters with a matrix for each expert."""
    return [
        name
        for name, parameter in model.named_parameters()
        if "expert" in name and (parameter.ndim == 3 or "DbrxExpertGLU" in owner(model, name))
    ]


def owner(model: nn.Module, name: str) -> str:
    """Return the class of the module that has a parameter."""
    return type(model.get_submodule(name.rpartition(".")[0])).__name__


def check(family: str, kind: type[transformers.PreTrainedModel]) -> Found:
    """Adapt the experts of a model, randomize B, load the saved adapter with PEFT, and merge it."""
    model, batch = build(family, kind), tokens(family)
    base, names = outputs(model, batch), fused_names(model)
    missing: dict[str, str] = {}
    for name in names:
        try:
            with ipa_hf.expert_layers(model, [name]):
                pass
        except LayerError as error:
            missing[name] = _reason(error)
    names = [name for name in names if name not in missing]
    if not names:
        return Found(kind.__name__, missing=missing)
    with tempfile.TemporaryDirectory() as folder:
        try:
            collected = difference(_collected(model, names, batch), base)
            adapted = _adapted(model, names, batch)
        except LayerError as error:
            return Found(kind.__name__, missing=missing | dict.fromkeys(names, _reason(error)))
        begun = difference(outputs(adapted, batch), base)
        randomize(adapted)
        silent = _without_gradient(adapted, batch)
        changed = outputs(adapted, batch)
        adapted.save_pretrained(folder)
        again = PeftModel.from_pretrained(build(family, kind), folder)
        return Found(
            kind.__name__,
            len(names),
            missing=missing,
            collected=collected,
            begun=begun,
            effect=difference(changed, base),
            silent=silent,
            export=export_form(adapted, Path(folder) / "export"),
            stock=difference(outputs(again, batch), changed),
            merged=difference(outputs(again.merge_and_unload(), batch), changed),
        )


def tokens(family: str) -> dict[str, torch.Tensor]:
    """Return two texts at random, one half as long as the other."""
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if family == "ernie4_5_vl_moe":  # has separate experts for image tokens
        batch["moe_mm_token_type_ids"] = ids % 2
    return batch


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the last hidden states, or logits."""
    states: torch.Tensor = model(**batch, use_cache=False)[0]
    return states


def _collected(model: nn.Module, names: list[str], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with ipa_hf.expert_layers(model, names):
        return outputs(model, batch)


def _adapted(model: nn.Module, names: list[str], batch: dict[str, torch.Tensor]) -> PeftModel:
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=names)
    return ipa_hf.get_ipa_model(
        model,
        lora,
        [batch],
        learner=ExactCovariance,
        expert_sharing="unreached",
        on_missing="raise",
        progress=False,
    )


def export_form(model: PeftModel, folder: Path) -> str:
    """Return the form of the exported adapter: by expert, fused as in PEFT, or refused."""
    try:
        ipa_hf.export_lora(model, folder)
    except SettingError:
        return "refused"
    settings = json.loads((folder / "adapter_config.json").read_text())
    return "fused" if settings["target_parameters"] else "by expert"


def _reason(error: Exception) -> str:
    """Return the reason in an error message, without the layer's name."""
    return str(error).partition("\n")[0].partition("': ")[2].partition(";")[0].partition(")")[0]


def randomize(model: PeftModel) -> None:
    """Set B to random values."""
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model, "default").values():
        b = layer.lora_B["default"].weight
        with torch.no_grad():
            b.copy_(torch.randn(b.shape, generator=generator))


def _without_gradient(model: PeftModel, batch: dict[str, torch.Tensor]) -> int:
    output = model(**batch, use_cache=False)[0]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * weights).sum().backward()
    gradients = [x.lora_B["default"].weight.grad for x in lora_layers(model, "default").values()]
    model.zero_grad()
    return sum(gradient is None or not gradient.any() for gradient in gradients)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest output."""
    return float((one - other).abs().max() / torch.maximum(one.abs(), other.abs()).max())


def walk() -> Iterator[tuple[str, Found]]:
    """Yield the result of each family."""
    for family, module in families().items():
        kind = model_class(module)
        try:
            found = check(family, kind)
        except Exception as error:  # reported as a failure of the family
            found = Found(kind.__name__, error=f"{type(error).__name__}: {error}")
        print(f"{family}: {found.verdict} {found}", flush=True)
        yield family, found


def report(found: dict[str, Found]) -> str:
    """Return the table of all families."""
    rows = [
        [
            family,
            f"`{result.model}`",
            result.verdict,
            str(result.parameters),
            f"{result.effect:.1g}" if result.parameters else "-",
            f"{result.largest_difference:.0e}" if result.parameters else "-",
            result.export,
            result.error.replace("|", "/").replace("\n", " ")[:200]
            or "; ".join(dict.fromkeys(result.missing.values())),
        ]
        for family, result in found.items()
    ]
    works = sum(result.works for result in found.values())
    refused = sum(result.verdict == "refused" for result in found.values())
    header = ["family", "model", "verdict", "parameters", "effect", "error", "export", "reason"]
    return (
        f"transformers {transformers.__version__}: {len(found)} families with fused experts, "
        f"{works} work, {refused} refused, {len(found) - works - refused} fail.\n\n"
        f"{record.table(header, rows)}\n"
    )


def main() -> int:
    """Write the table; the exit status is the number of families that fail."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = dict(walk())
    (record.FOLDER / "hf_moe_families.md").write_text(report(found))
    return sum(result.verdict == "FAILS" for result in found.values())


if __name__ == "__main__":
    sys.exit(main())
