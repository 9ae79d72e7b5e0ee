"""Tiny random models of common families, with input batches."""

import copy

import torch
import transformers
from peft import LoraConfig

VOCABULARY = 64
TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


def make(family):
    """Return a tiny random model with the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return _BUILDERS[family]().eval()


def config(family="llama", **settings):
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family]}
    return LoraConfig(**(defaults | settings))


def text_batches(count=4, size=6, length=10, padding=3):
    """Return batches of random tokens; the last positions of the last row are padding."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, VOCABULARY, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, length - padding :] = 0
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def outputs(model, batch):
    """Return the first output of a model: its logits, or last hidden state."""
    model.eval()
    with torch.no_grad():
        return model(**batch)[0]


def train(model, batches, steps=4, rate=1e-2):
    """Train for a few steps on an arbitrary loss."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        model(**batches[step % len(batches)])[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def base_state(model):
    """Return copies of the base weights by their names in the model without adapters."""
    plain = getattr(model, "get_base_model", lambda: model)()
    return {
        name.replace(".base_layer", ""): copy.deepcopy(value)
        for name, value in plain.state_dict().items()
        if "lora_" not in name
    }


def same_state(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[x], other[x]) for x in state)


def _bert():
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        add_pooling_layer=False,
    )


def _llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def _gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2)
    )


_BUILDERS = {"bert": _bert, "llama": _llama, "gpt2": _gpt2}
