"""Default target layers of transformers models: the linear layers of repeated blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ipa_core.errors import SettingError
from ipa_hf.peft_support import is_known_to_peft, trainable_by_peft
from ipa_hf.repeated_blocks import block_modules
from ipa_hf.target_pattern import target_pattern
from ipa_torch.extension import check_model, features_of, outputs_of


def default_targets(model: torch.nn.Module) -> str:
    """Return a regular expression for ``LoraConfig(target_modules=...)``: linear layers of blocks.

    Blocks are the repeated parts of a model (the entries of a ``ModuleList``, and of a
    ``Sequential`` of equal parts). All their linear layers are targets: query, key, value and
    output, up, gate and down, fused or not, under any name. Embeddings, poolers and heads lie
    outside of blocks. Within blocks, routers, gates of one output, and layers that PEFT cannot
    adapt are left out. Fused experts are no linear layers: see `target_coverage`.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model. If it has a ``language_model`` beside other towers, only layers of
        the language model match; in models of two equal towers (CLIP, SigLIP), layers of both.

    Returns
    -------
    str
        PEFT matches it against whole layer names.

    Raises
    ------
    SettingError
        If the model has no linear layers in repeated blocks.

    Examples
    --------
    >>> import re
    >>> from transformers import BertConfig, BertModel
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> bert = BertModel(BertConfig(vocab_size=16, **size))
    >>> pattern = default_targets(bert)
    >>> [name for name, _ in bert.named_modules() if re.fullmatch(pattern, name)][-2:]
    ['encoder.layer.0.intermediate.dense', 'encoder.layer.0.output.dense']
    """
    check_model(model)
    names = trainable_by_peft(model, list(_block_layers(model)))
    if not names:
        raise SettingError(
            f"expected a model with linear layers in repeated blocks, got {type(model).__name__} "
            "with none; set target_modules in the LoraConfig, for example to 'all-linear'"
        )
    return target_pattern(names, (name for name, _ in model.named_modules()))


def _block_layers(model: nn.Module) -> Iterator[str]:
    """Yield the names of the linear layers of blocks that are worth an adapter and take one."""
    named = dict(model.named_modules())
    tables = {id(x.weight) for x in named.values() if isinstance(x, nn.Embedding)}
    layers: tuple[str, ...] = ()
    for name, module in block_modules(model):
        parent = named[name.rpartition(".")[0]]
        if name.startswith(layers) or not is_known_to_peft(module, model):
            continue
        layers += (f"{name}.",)
        outputs = outputs_of(module)
        if min(features_of(module), outputs) == 1 or outputs == _experts_beside(parent):
            continue
        read_directly = isinstance(parent, nn.MultiheadAttention)
        if not read_directly and id(getattr(module, "weight", None)) not in tables:
            yield name


def _experts_beside(parent: nn.Module) -> int | None:
    """Return the number of experts in a module, and so of its router's outputs."""
    experts = getattr(parent, "experts", None)
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        return len(experts)
    count = getattr(experts, "num_experts", None)
    return count if isinstance(count, int) else None
