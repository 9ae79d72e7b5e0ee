"""Giving more rank to the layers whose inputs need it, without changing what alpha means."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping

from peft import LoraConfig

from ipa_core import Projector
from ipa_core.errors import RankError


def redistribute_ranks(config: LoraConfig, projectors: Mapping[str, Projector]) -> LoraConfig:
    r"""Return a configuration with the same total rank, shared out by captured energy.

    Of all rows of all projectors, those go first whose share of their layer's energy,
    ``energies / total_energy``, is largest, until ``config.r`` rows a layer are spent; every layer
    keeps at least one. Alphas follow the ranks such that each layer's scaling stays alpha / r
    (alpha / sqrt(r) with rsLoRA) of the configuration that came in.

    Parameters
    ----------
    config : LoraConfig
        Its ``r`` is the mean rank. Not changed.
    projectors : mapping of str to Projector
        By layer, of a larger rank than ``config.r``, say twice: their rank is the most that a layer
        can get.

    Returns
    -------
    LoraConfig
        With ``rank_pattern`` and ``alpha_pattern``; hand it to `get_ipa_model` with the same
        projectors.

    Raises
    ------
    RankError
        If a projector has fewer rows than ``config.r``.

    Notes
    -----
    O(n log n) for n rows in all. EVA proposed this rule (arXiv 2410.07170).

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import fit_projector
    >>> flat, steep = fit_projector(np.eye(9), rank=4), fit_projector(np.eye(9)[:3], rank=4)
    >>> lora = LoraConfig(r=2, lora_alpha=4, target_modules=["flat", "steep"])
    >>> chosen = redistribute_ranks(lora, {"flat": flat, "steep": steep})
    >>> chosen.rank_pattern, chosen.alpha_pattern
    ({'flat': 1, 'steep': 3}, {'flat': 2.0, 'steep': 6.0})
    """
    for name, projector in projectors.items():
        if projector.rank < config.r:
            raise RankError(
                f"layer {name!r}: expected a projector of rank {config.r} or more, got "
                f"{projector.rank}; learn with twice the rank of the configuration"
            )
    ranks = _shared_out(projectors, config.r * len(projectors))
    chosen = copy.deepcopy(config)
    chosen.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    chosen.alpha_pattern = {
        name: config.lora_alpha * _alpha_ratio(rank / config.r, config.use_rslora)
        for name, rank in chosen.rank_pattern.items()
    }
    return chosen


def _shared_out(projectors: Mapping[str, Projector], budget: int) -> dict[str, int]:
    # A layer's energies decrease, so taking its largest ones is taking its leading rows.
    spare = [
        (float(energy) / (projector.total_energy or 1.0), name)
        for name, projector in projectors.items()
        for energy in projector.energies[1:]
    ]
    spare.sort(key=lambda row: -row[0])
    taken = Counter(name for _, name in spare[: budget - len(projectors)])
    return {name: 1 + taken[name] for name in projectors}


def _alpha_ratio(rank_ratio: float, use_rslora: bool) -> float:
    return math.sqrt(rank_ratio) if use_rslora else rank_ratio
