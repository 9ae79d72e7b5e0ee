"""What the learners of a model will hold, said before they learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ipa_core import Learner, RandomizedSVD
from ipa_torch.feeding import Forward, feed
from ipa_torch.projectors import rank_for
from ipa_torch.targets import ALL_LINEAR, Targets, select_layers
from ipa_torch.turns import bytes_by_input
from ipa_torch.wrapping import plain


def learner_bytes(
    model: nn.Module,
    batch: Any,
    rank: int | Mapping[str, int],
    *,
    targets: Targets = ALL_LINEAR,
    learner: Callable[[int], Learner] = RandomizedSVD,
    forward: Forward | None = None,
    tolerance: float | None = None,
) -> dict[tuple[str, ...], int]:
    """Return the bytes that `fit_projectors` will hold for learners, before it is called.

    The sum is the least ``max_bytes`` with which it learns in one pass; with fewer it takes turns.

    Parameters
    ----------
    model, rank, targets, learner, forward, tolerance
        As for `fit_projectors`.
    batch
        One batch of those to learn from: it shows which layers share an input.

    Returns
    -------
    dict of tuple of str to int
        For each learner the layers that share it, and its bytes while a batch is read: at most two
        states, of the largest it will come to, for float32 inputs. Without the passing workspace of
        the one that is learning, and the batch's own activations.

    Raises
    ------
    LayerError
        If ``targets`` match nothing, a mapping of ranks leaves out a layer, or a layer that the
        batch does not reach says nothing of its features.
    RankError
        If a rank is above the features of its input; the message names the layer.

    Notes
    -----
    Cost: a forward pass, and a few thousand random rows for each different size of input, as
    learners are of many kinds.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import learner_bytes
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
    >>> sizes = learner_bytes(model, torch.randn(4, 64), rank=2)
    >>> list(sizes), sum(sizes.values()) < 1_000_000
    ([('0',), ('1',)], True)
    """
    model = plain(model)
    layers = select_layers(model, targets)
    ranks = {name: rank_for(name, rank) for name in layers}
    run = feed if forward is None else forward
    converging = tolerance is not None
    return bytes_by_input(model, layers, ranks, learner, batch, run, converging=converging)
