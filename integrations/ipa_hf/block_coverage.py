"""Share of the weights of a model's blocks that targets cover."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from ipa_core.caller_warnings import warn_caller
from ipa_hf.fused_parameters import refusal
from ipa_hf.repeated_blocks import block_modules
from ipa_torch.extension import (
    Convolution,
    check_model,
    compile_pattern,
    features_of,
    is_linear,
    outputs_of,
)


def target_coverage(model: torch.nn.Module, targets: str) -> float:
    r"""Return the share of the blocks' weight matrices that are those of target layers.

    Counted are the weights of linear layers and all other parameters of two axes or more, such as
    fused experts, within repeated blocks; embeddings and convolutions are not.

    Parameters
    ----------
    model : torch.nn.Module
        A model without adapters; one on the meta device will do.
    targets : str
        A regular expression for whole layer names, as `default_targets` returns it.

    Returns
    -------
    float
        Between 0 and 1; 0 for a model without blocks.

    Raises
    ------
    SettingError
        If ``targets`` is no regular expression.

    Examples
    --------
    >>> from transformers import BertConfig, BertModel
    >>> import ipa_hf
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> bert = BertModel(BertConfig(vocab_size=16, **size))
    >>> target_coverage(bert, ipa_hf.default_targets(bert))
    1.0
    >>> round(target_coverage(bert, r".*\.(query|value)"), 2)
    0.33
    """
    check_model(model)
    pattern = compile_pattern(targets)
    covered = total = 0
    for name, size in _matrices(model):
        total += size
        covered += size if pattern.fullmatch(name) else 0
    return covered / total if total else 0.0


def warn_of_small_coverage(model: torch.nn.Module, targets: str) -> None:
    """Warn if targets cover less than half of the blocks' weights; name what is left out."""
    share = target_coverage(model, targets)
    if share >= 0.5:
        return
    left_out: Counter[str] = Counter()
    for name, size in _matrices(model):
        if not re.fullmatch(targets, name):
            left_out[re.sub(r"\b\d+\b", "*", name)] += size
    experts = {
        f"{name.rpartition('.')[2]}.{leaf}"
        for name, module in block_modules(model)
        for leaf, _ in module.named_parameters(recurse=False)
        if refusal(module, leaf) is None
    }
    cure = (
        f"fused experts are adapted with target_parameters={sorted(experts)} in the LoraConfig"
        if experts
        else "name further layers in target_modules"
    )
    largest = ", ".join(name for name, _ in left_out.most_common(3))
    warn_caller(
        f"the default targets cover {share:.0%} of the weights of the model's blocks; the largest "
        f"left out are {largest}; {cure}",
    )


def _matrices(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of linear layers, and of other parameters of two axes or more."""
    layers: tuple[str, ...] = ()
    for name, module in block_modules(model):
        if name.startswith(layers):
            continue
        if is_linear(module) or isinstance(module, (nn.Embedding, Convolution)):
            layers += (f"{name}.",)  # what is inside belongs to the layer
        if is_linear(module):
            yield name, features_of(module) * outputs_of(module)
        elif not isinstance(module, (nn.Embedding, Convolution)):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2 and "bias" not in leaf:
                    yield f"{name}.{leaf}", parameter.numel()
