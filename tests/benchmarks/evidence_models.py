"""Tiny models with tokenizers, as folders that the runners read, and toy data for them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.evidence.questions import Question

GOOD, BAD = ("good", "great", "fine", "lovely"), ("bad", "awful", "poor", "dire")
FILLING = ("a", "very", "film", "plot", "indeed", "it", "was", "so")
SYMBOLS = ("[UNK]", "[PAD]", "Question:", "Answer:", ".", "?")
VOCABULARY = {word: place for place, word in enumerate((*SYMBOLS, *GOOD, *BAD, *FILLING))}


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]"
    ).save_pretrained(folder)


def bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.3,  # so that it tells texts apart
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=VOCABULARY["[PAD]"],
        eos_token_id=VOCABULARY["[PAD]"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(VOCABULARY), **size)).eval()


def rows(count: int) -> list[tuple[str, int]]:
    """Return different texts, labeled by whether their one telling word is a good one."""
    generator = torch.Generator().manual_seed(0)

    def words(source: tuple[str, ...], number: int) -> list[str]:
        return [source[i] for i in torch.randint(len(source), (number,), generator=generator)]

    found: dict[str, int] = {}
    while len(found) < count:
        label = len(found) % 2
        length = int(torch.randint(2, 9, (1,), generator=generator))
        text = words(FILLING, length) + words((BAD, GOOD)[label], 1) + words(FILLING, 2)
        found[" ".join(text)] = label
    return list(found.items())


def questions(count: int) -> list[Question]:
    return [Question(text, ("bad", "good film"), label) for text, label in rows(count)]
