"""Adapt tiny models of all families with fused experts: python -m benchmarks.hf_moe_families.

Writes ``results/hf_moe_families.md``: the families of transformers that work, and those that are
refused, with the reason. In its columns, ``effect`` is the change of outputs by a random B, and
``error`` the largest difference of outputs that should be equal, both relative to the largest
output; ``export`` is the form in which `ipa_hf.export_lora` writes the adapter.
"""

import copy
import importlib
import inspect
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import nn

import ipa_hf
from benchmarks import record
from ipa_core import ExactCovariance
from ipa_core.errors import SettingError
from ipa_hf.lora_layers import lora_layers
from ipa_torch import LayerError

RANK = 4
#: Relative difference of equal outputs, at most.
TOLERANCE = 1e-5
#: Source of a parameter with an axis of experts.
FUSED = re.compile(
    r"nn\.Parameter\(\s*torch\.\w+\(\s*\(?\s*[\w.]*experts[\w.]*(,[^()]*,| \*)[^()]*\)"
)
#: Sizes of a tiny model, as far as its configuration has the setting.
SIZES = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 0,
}
#: Further settings of a family.
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1, "num_experts_per_token": 2} | SPARSE,
    "beam": SPARSE,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "deepseek_ocr2": SPARSE,
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "ernie4_5_vl_moe": {
        "moe_k": 2,
        "moe_intermediate_size": [24, 16],
        "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]},
    }
    | SPARSE,
    "flint": {"mlp_only_layers": []},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {
        "rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    },
    "glm5_next": {"qk_rope_head_dim": 0} | SPARSE,
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "kimi_linear": {"num_experts_per_token": 2} | SPARSE,
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 0},
    "longcat_flash": {
        "head_dim": 8,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "num_layers": 1,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
    },
    "mimo_v2_flash": {"num_key_value_heads": 2} | SPARSE,
    "step3p7": {"sliding_window": 16, "share_expert_dim": 24} | SPARSE,
    "zaya": {"num_experts_per_tok": 1},
}


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


def families() -> dict[str, ModuleType]:
    """Return the modules of transformers that define fused experts, by family."""
    folder = Path(transformers.__file__).parent / "models"
    return {
        path.parent.name: importlib.import_module(
            f"transformers.models.{path.parent.name}.{path.stem}"
        )
        for path in sorted(folder.glob("*/modeling_*.py"))
        if FUSED.search(path.read_text())
    }


def model_class(module: ModuleType) -> type[transformers.PreTrainedModel]:
    """Return the first model with tokens as input, which is mostly the text model."""
    return next(
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind)
        and issubclass(kind, transformers.PreTrainedModel)
        and kind.__module__ == module.__name__
        and kind.config_class
        and "input_ids" in inspect.signature(kind.forward).parameters
    )


def build(family: str, kind: type[transformers.PreTrainedModel]) -> transformers.PreTrainedModel:
    """Return a tiny random model without parameters at zero; the same at every call."""
    known = kind.config_class().to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in known}
    if "head_dim" in known and "qk_rope_head_dim" not in known:
        sizes["head_dim"] = 8
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes | copy.deepcopy(OWN.get(family, {})))).eval()
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3 or not parameter.isfinite().all():
            nn.init.normal_(parameter, std=0.1)
    return model


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
            collected = _difference(_collected(model, names, batch), base)
            adapted = _adapted(model, names, batch)
        except LayerError as error:
            return Found(kind.__name__, missing=missing | dict.fromkeys(names, _reason(error)))
        begun = _difference(outputs(adapted, batch), base)
        _randomize(adapted)
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
            effect=_difference(changed, base),
            silent=silent,
            export=export_form(adapted, Path(folder) / "export"),
            stock=_difference(outputs(again, batch), changed),
            merged=_difference(outputs(again.merge_and_unload(), batch), changed),
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


def _randomize(model: PeftModel) -> None:
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


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
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
