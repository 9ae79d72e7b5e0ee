"""Tiny random models of all families of transformers with fused experts."""

import copy
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn

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


def model_classes(module: ModuleType) -> list[type[transformers.PreTrainedModel]]:
    """Return the models that a module of transformers defines, base classes included."""
    return [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind)
        and issubclass(kind, transformers.PreTrainedModel)
        and kind.__module__ == module.__name__
        and kind.config_class
    ]


def model_class(module: ModuleType) -> type[transformers.PreTrainedModel]:
    """Return the first model with tokens as input, which is mostly the text model."""
    return next(
        kind
        for kind in model_classes(module)
        if "input_ids" in inspect.signature(kind.forward).parameters
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
