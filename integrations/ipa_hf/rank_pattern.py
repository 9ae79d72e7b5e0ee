"""Layers of different rank, without changing what alpha means."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

from peft import LoraConfig

from ipa_core import Projector


def match_ranks(config: LoraConfig, projectors: Mapping[str, Projector]) -> LoraConfig:
    r"""Return a configuration that gives each layer the rank of its projector, at equal scaling.

    PEFT scales a layer by alpha / rank, so ranks that differ would scale layers differently. Here
    the alphas follow the ranks, and every layer keeps the scaling alpha / r (alpha / sqrt(r) with
    rsLoRA) of the configuration that came in.

    Parameters
    ----------
    config : LoraConfig
        Its patterns of ranks and alphas are replaced; not changed.
    projectors : mapping of str to Projector
        By layer; ``ipa_torch.LayerProjectors.allocate`` spreads a budget of ranks over them.

    Returns
    -------
    LoraConfig
        With ``rank_pattern`` and ``alpha_pattern``; hand it to `get_ipa_model` with the same
        projectors.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import fit_projector
    >>> ranks = {"q_proj": 1, "v_proj": 3}
    >>> projectors = {name: fit_projector(np.eye(4), rank) for name, rank in ranks.items()}
    >>> lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    >>> chosen = match_ranks(lora, projectors)
    >>> chosen.rank_pattern, chosen.alpha_pattern
    ({'q_proj': 1, 'v_proj': 3}, {'q_proj': 2.0, 'v_proj': 6.0})
    """
    matched = copy.deepcopy(config)
    matched.rank_pattern = {
        name: projector.rank for name, projector in projectors.items() if projector.rank != config.r
    }
    matched.alpha_pattern = {
        name: config.lora_alpha * _growth(rank / config.r, config.use_rslora)
        for name, rank in matched.rank_pattern.items()
    }
    return matched


def _growth(ratio: float, use_rslora: bool) -> float:
    return math.sqrt(ratio) if use_rslora else ratio
