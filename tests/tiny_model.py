"""A tiny causal language model on disk."""


def write_model(folder):
    """Write a tiny Llama that takes rank 32, with a tokenizer of letters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **size)).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)


def letter_tokenizer(**settings):
    """Return a tokenizer of the letters ``a`` to ``m`` as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<pad>", "<s>", *"abcdefghijklm"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>", **settings)
