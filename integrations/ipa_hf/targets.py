"""Default target layers of transformers models."""

from __future__ import annotations

import re

import torch

from ipa_core.errors import SettingError

# Query, key, value, up and down projections, as in the paper, under the names that the families of
# transformers give them. Output and gate projections, poolers and heads are excluded.
_NAMES = (
    r"q|k|v|q_proj|k_proj|v_proj|query|key|value|c_attn",
    r"up_proj|down_proj|fc1|fc2|wi|wi_0|wi_1|wo|mlp\.c_fc|mlp\.c_proj",
    r"intermediate\.dense|(?<!attention\.)output\.dense",
)
_TARGETS = rf".*\.({'|'.join(_NAMES)})"
# In models with a vision or audio tower, only layers of the language model.
_LANGUAGE_ONLY = rf".*\blanguage_model\.{_TARGETS}"


def default_targets(model: torch.nn.Module) -> str:
    """Return a regular expression for ``LoraConfig(target_modules=...)``: q, k, v, up and down.

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
        If no layer name matches.

    Examples
    --------
    >>> from transformers import BertConfig, BertModel
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> bert = BertModel(BertConfig(vocab_size=16, **size))
    >>> pattern = default_targets(bert)
    >>> [name for name, _ in bert.named_modules() if re.fullmatch(pattern, name)][-2:]
    ['encoder.layer.0.intermediate.dense', 'encoder.layer.0.output.dense']
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in (_LANGUAGE_ONLY, _TARGETS):
        if any(re.fullmatch(pattern, name) for name in names):
            return pattern
    raise SettingError(
        "expected a model with the usual names of query, key, value, up or down layers, got "
        f"{type(model).__name__} with none; set target_modules in the LoraConfig, for example to "
        "'all-linear'"
    )
