"""The layers that get an adapter where the user names none."""

from __future__ import annotations

import re

import torch

from ipa_core.errors import SettingError

# The method's own choice: query, key, value, up and down. These are their names in the families of
# transformers; o_proj, gate_proj, poolers and heads are none of them.
_NAMES = (
    r"q|k|v|q_proj|k_proj|v_proj|query|key|value|c_attn",
    r"up_proj|down_proj|fc1|fc2|wi|wi_0|wi_1|wo|mlp\.c_fc|mlp\.c_proj",
    r"intermediate\.dense|(?<!attention\.)output\.dense",
)
_TARGETS = rf".*\.({'|'.join(_NAMES)})"
# A language model with a vision or an audio tower is adapted in its language model.
_LANGUAGE_ONLY = rf".*\blanguage_model\.{_TARGETS}"


def default_targets(model: torch.nn.Module) -> str:
    """Return a regular expression for ``LoraConfig(target_modules=...)``: q, k, v, up and down.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model. Of one with several towers around a ``language_model``, only that is
        meant; of two equal towers (CLIP, SigLIP), both.

    Returns
    -------
    str
        Matched by PEFT against whole names of layers.

    Raises
    ------
    SettingError
        If the model has no layers of such names.

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
        "expected a model with layers named like a transformer's query, key, value, up or down, "
        f"got {type(model).__name__}; name target_modules in the LoraConfig, or 'all-linear'"
    )
