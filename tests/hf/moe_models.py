"""Tiny random models with fused experts, and their experts' inputs captured by hand."""

import copy

import pytest
import torch
import transformers

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NARROW = SIZE | {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
FAMILIES = {
    "Mixtral": ("MixtralForCausalLM", SIZE | {"num_local_experts": 4}),
    "Qwen3Moe": ("Qwen3MoeForCausalLM", NARROW | {"num_experts": 8, "head_dim": 16}),
    # Transposed parameters with biases, and gates interleaved with what they act on.
    "GptOss": (
        "GptOssForCausalLM",
        SIZE | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    # A shared expert beside the routed ones, and a first block without experts.
    "DeepseekV3": (
        "DeepseekV3ForCausalLM",
        NARROW
        | LATENT
        | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "Olmoe": (
        "OlmoeForCausalLM",
        SIZE | {"num_experts": 4, "num_experts_per_tok": 2},
    ),
    "GraniteMoe": (
        "GraniteMoeForCausalLM",
        SIZE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    # Experts without a gate.
    "NemotronH": (
        "NemotronHForCausalLM",
        NARROW
        | {
            "layers_block_type": ["attention", "moe"],
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 16,
            "moe_shared_expert_intermediate_size": 24,
        },
    ),
}
TARGETS = ["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"]


def make(family):
    """Build a tiny random model, the same at every call; skip if there is no such class."""
    name, settings = FAMILIES[family]
    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")
    kind = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind(kind.config_class(**copy.deepcopy(settings))).eval()
        # Tokens that differ, so that each expert has some.
        torch.nn.init.normal_(model.get_input_embeddings().weight)
        for name, parameter in model.named_parameters():
            if name.endswith("proj_bias"):  # of experts; zeros at first
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def batches(count=4, size=6, length=12):
    """Give batches of random tokens, the second half of each text but the first padding."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 64, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, length // 2 :] = 0
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def experts_of(model):
    """Return the modules with fused experts by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith("experts") and hasattr(module, "down_proj") and hasattr(module, "has_gate")
    }


@torch.no_grad()
def captured_rows(model, batches):
    """Return for each expert's matrix its inputs and their routing weights, without padding.

    From the arguments of the experts' modules, each expert computed for its tokens alone.
    """
    captured = {}
    for batch in batches:
        kept = batch["attention_mask"].reshape(-1).bool()
        handles = [
            module.register_forward_pre_hook(_capture(captured, name, kept))
            for name, module in experts_of(model).items()
        ]
        model(**batch)
        for handle in handles:
            handle.remove()
    return {
        name: tuple(torch.cat(part) for part in zip(*rows, strict=True))
        for name, rows in captured.items()
    }


def _capture(captured, name, kept):
    def hook(module, arguments):
        tokens, index, weights = arguments
        first = "gate_up_proj" if module.has_gate else "up_proj"
        for expert in range(module.num_experts):
            token, choice = torch.where((index == expert) & kept[:, None])
            if not len(token):
                continue
            rows, weight = tokens[token], weights[token, choice].float()
            hidden = _product(module, first, expert, rows)
            hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
            captured.setdefault(f"{name}.{first}[{expert}]", []).append((rows, weight))
            captured.setdefault(f"{name}.down_proj[{expert}]", []).append((hidden, weight))

    return hook


def _product(module, parameter, expert, rows):
    matrix = getattr(module, parameter)[expert]
    bias = getattr(module, f"{parameter}_bias")[expert] if module.has_bias else 0
    return rows @ (matrix if module.is_transposed else matrix.T) + bias


def excess(projector, rows, weights=None):
    """Return how far a projector's weighted residual lies above the optimum, in float64."""
    x = rows.double()
    if weights is not None:
        x = x * weights.double().sqrt()[:, None]
    p = torch.as_tensor(projector.components).double()
    total = x.square().sum()
    optimum = torch.linalg.svdvals(x)[p.shape[0] :].square().sum()
    span = torch.linalg.qr(p.T).Q
    return float((total - (x @ span).square().sum() - optimum) / total)
