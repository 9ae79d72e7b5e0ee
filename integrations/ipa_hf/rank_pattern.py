"""LoRA configurations with a rank and an alpha for each layer."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping

from peft import LoraConfig

from ipa_core import Projector
from ipa_core.errors import RankError
from ipa_hf.layer_names import layer_name
from ipa_hf.lora_config import check_lora_config, copy_lora_config
from ipa_torch.extension import check_projectors


def match_ranks(config: LoraConfig, projectors: Mapping[str, Projector]) -> LoraConfig:
    r"""Return a configuration with the rank of each layer's projector, at unchanged scaling.

    PEFT scales a layer by alpha / rank, so different ranks would scale layers differently. Alphas
    are therefore set in proportion to the ranks: every layer keeps the scaling alpha / r
    (alpha / sqrt(r) with rsLoRA) of ``config``.

    Parameters
    ----------
    config : LoraConfig
        Copied; its ``rank_pattern`` and ``alpha_pattern`` are replaced in the copy.
    projectors : mapping of str to Projector
        By layer, for example from ``ipa_torch.LayerProjectors.allocate``. The experts of a fused
        parameter have one rank: `expert_layers` with ``sharing="always"`` fits one projector.

    Returns
    -------
    LoraConfig
        For `get_ipa_model`, with the same projectors.

    Raises
    ------
    SettingError
        If ``config`` is no `LoraConfig`, or ``projectors`` no mapping from names to projectors.
    RankError
        If the experts of a fused parameter have projectors of different ranks.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import fit_projector
    >>> ranks = {"q_proj": 1, "v_proj": 3}
    >>> projectors = {name: fit_projector(np.eye(4), rank) for name, rank in ranks.items()}
    >>> lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    >>> matched = match_ranks(lora, projectors)
    >>> matched.rank_pattern, matched.alpha_pattern
    ({'q_proj': 1, 'v_proj': 3}, {'q_proj': 2.0, 'v_proj': 6.0})
    """
    check_lora_config(config)
    check_projectors(projectors)
    matched = copy_lora_config(config)
    ranks: dict[str, int] = {}
    for slot, projector in projectors.items():
        name = layer_name(slot)
        if ranks.setdefault(name, projector.rank) != projector.rank:
            raise RankError(
                f"layer {name!r}: expected one rank for all experts, got {ranks[name]} and "
                f"{projector.rank}; truncate the projectors, or fit one that the experts share"
            )
    keys = _pattern_keys(ranks)
    matched.rank_pattern = {keys[name]: rank for name, rank in ranks.items() if rank != config.r}
    matched.alpha_pattern = {
        key: config.lora_alpha * _alpha_ratio(rank / config.r, config.use_rslora)
        for key, rank in matched.rank_pattern.items()
    }
    return matched


def _pattern_keys(names: Collection[str]) -> dict[str, str]:
    """Return a key for each layer that PEFT matches to no other of the layers.

    PEFT reads a key as a regular expression for the end of a name, from a dot on. A name that would
    match another layer too is escaped and anchored to the start.
    """
    ends = Counter(end for name in names for end in _name_ends(name))
    return {name: name if ends[_folded(name)] == 1 else f"^{re.escape(name)}" for name in names}


def _name_ends(name: str) -> set[str]:
    parts = name.split(".")
    return {_folded(".".join(parts[start:])) for start in range(len(parts))}


def _folded(name: str) -> str:
    """Return the name with dots, which match any character, as the character they may match."""
    return name.replace(".", "_")


def _alpha_ratio(rank_ratio: float, use_rslora: bool) -> float:
    return math.sqrt(rank_ratio) if use_rslora else rank_ratio
