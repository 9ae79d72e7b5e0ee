"""Tiny random models, one per family, with input batches."""

from dataclasses import dataclass

import torch
import transformers

SIZE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = SIZE | {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CAUSAL = TEXT | {"num_key_value_heads": 2}
VISION = SIZE | {"image_size": 16, "patch_size": 4}
DINO = {name: value for name, value in VISION.items() if name != "intermediate_size"}


@dataclass(frozen=True)
class Family:
    """Class, configuration and inputs of a model, and its number of default target layers."""

    model: str
    config: str
    settings: dict
    inputs: tuple[str, ...]
    layers: int

    def make(self):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = getattr(transformers, self.config)(**self.settings)
            return getattr(transformers, self.model)(config).eval()

    def batches(self, count=3):
        generator = torch.Generator().manual_seed(2)
        return [{name: _INPUTS[name](generator) for name in self.inputs} for _ in range(count)]


def _ids(generator):
    return torch.randint(3, 60, (6, 10), generator=generator)


_INPUTS = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "attention_mask": lambda _: torch.ones(6, 10, dtype=torch.long),
    "pixel_values": lambda generator: torch.randn(6, 3, 16, 16, generator=generator),
    "input_features": lambda generator: torch.randn(6, 8, 20, generator=generator),
}
_TEXT_IN = ("input_ids", "attention_mask")
_TEXT_AND_IMAGE = ("input_ids", "pixel_values")

FAMILIES = {
    "Llama": Family("LlamaForCausalLM", "LlamaConfig", CAUSAL, _TEXT_IN, 14),
    "Qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", CAUSAL, _TEXT_IN, 14),
    "Qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", CAUSAL | {"head_dim": 8}, _TEXT_IN, 14),
    "Mistral": Family("MistralForCausalLM", "MistralConfig", CAUSAL, _TEXT_IN, 14),
    "Gemma-3 text": Family(
        "Gemma3ForCausalLM", "Gemma3TextConfig", CAUSAL | {"head_dim": 8}, _TEXT_IN, 14
    ),
    "Gemma-3": Family(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": CAUSAL | {"head_dim": 8},
            "vision_config": VISION,
            "mm_tokens_per_image": 16,
            "image_token_index": 60,
            "boi_token_index": 61,
            "eoi_token_index": 62,
        },
        _TEXT_IN,
        14,
    ),
    "GPT-2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 64,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _TEXT_IN,
        8,
    ),
    "BERT": Family("BertModel", "BertConfig", TEXT, _TEXT_IN, 12),
    "MPNet": Family("MPNetModel", "MPNetConfig", TEXT, _TEXT_IN, 12),
    "T5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 64,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        (*_TEXT_IN, "decoder_input_ids"),
        2 * 6 + 2 * 10,
    ),
    "ViT": Family("ViTModel", "ViTConfig", VISION, ("pixel_values",), 12),
    "DINOv2": Family("Dinov2Model", "Dinov2Config", DINO, ("pixel_values",), 12),
    "CLIP": Family(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 8},
        _TEXT_AND_IMAGE,
        24,
    ),
    "SigLIP": Family(
        "SiglipModel",
        "SiglipConfig",
        {"text_config": TEXT, "vision_config": VISION},
        _TEXT_AND_IMAGE,
        24,
    ),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 64,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        ("input_features", "decoder_input_ids"),
        2 * 6 + 2 * 10,
    ),
    "Mixtral": Family(
        "MixtralForCausalLM", "MixtralConfig", CAUSAL | {"num_local_experts": 4}, _TEXT_IN, 8
    ),
}
