"""Bytes of the learners of a fit, before it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Self

import torch
from torch import nn

from ipa_core import Learner, RandomizedSVD
from ipa_core.errors import with_context
from ipa_core.learners.factory import make_learner
from ipa_torch._capture.activation_rows import ActivationRows
from ipa_torch._capture.eval_mode import eval_mode
from ipa_torch._capture.forward import Forward, resolve_forward
from ipa_torch._fit.attention_head_learners import LayerLearner
from ipa_torch._fit.collector import ActivationCollector, Source
from ipa_torch._fit.early_stopping import StoppingCriteria
from ipa_torch._fit.shared_inputs import SharedInputTree
from ipa_torch._layer_rank import resolve_rank
from ipa_torch._layers.layer_properties import features_of, outputs_of
from ipa_torch._layers.targets import ALL_LINEAR, Targets, select_layers
from ipa_torch._layers.unwrap import unwrap_model
from ipa_torch.errors import LayerError, named_layer

#: Rows of an update in a measurement: no divisor of a block, so that some rows are always pending.
_UPDATE_ROWS = 127


class _ShapeProbe:
    """Consumer that only records the features, for a pass that finds shared inputs."""

    passes = 1
    features: int | None = None
    samples = 0

    def begin_update(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> Self:
        self.features = int(rows.shape[-1])
        return self

    def finish(self) -> Self:
        return self


def learner_bytes(
    model: nn.Module,
    batch: Any,
    rank: int | Mapping[str, int],
    *,
    targets: Targets = ALL_LINEAR,
    learner: Callable[[int], Learner] = RandomizedSVD,
    forward: Forward | None = None,
    stop: StoppingCriteria | None = None,
) -> dict[tuple[str, ...], int]:
    """Return the bytes of the learners of `fit_projectors`, before it is called.

    The sum is the smallest ``max_bytes`` for a single pass.

    Parameters
    ----------
    model, rank, targets, learner, forward, stop
        As for `fit_projectors`.
    batch
        A batch of the calibration data: it shows which layers share an input.

    Returns
    -------
    dict of tuple of str to int
        The layers of each learner, and its bytes while a batch is read: at most two states, of the
        largest size that it reaches, for float32 inputs. Without the temporary workspace of an
        update, and the activations of the batch.

    Raises
    ------
    LayerError
        If ``targets`` match nothing, a mapping of ranks leaves out a layer, or a layer that the
        batch does not reach has no ``in_features``.
    RankError
        If a rank is above the features of its input; the message names the layer.

    Notes
    -----
    Cost: a forward pass, and an update by a few thousand random rows for each size of input.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import learner_bytes
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
    >>> sizes = learner_bytes(model, torch.randn(4, 64), rank=2)
    >>> list(sizes), sum(sizes.values()) < 1_000_000
    ([('0',), ('1',)], True)
    """
    model = unwrap_model(model)
    layers = select_layers(model, targets)
    ranks = {name: resolve_rank(name, rank) for name in layers}
    run = resolve_forward(forward)
    converging = StoppingCriteria.of(stop).tolerance is not None
    return bytes_by_input(
        model, layers, ranks, partial(make_learner, learner), batch, run, converging=converging
    )


def bytes_by_input(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    make_learner: Callable[[int], LayerLearner],
    batch: Any,
    run: Forward,
    *,
    converging: bool,
    source: Source = "inputs",
) -> dict[tuple[str, ...], int]:
    """Return the bytes of each learner, by the names of the layers that share it."""
    measured = cache(
        lambda rank, features: measure_learner_bytes(make_learner, rank, features, converging)
    )
    sizes = {}
    for names, features in _groups_by_input(model, layers, ranks, batch, run, source):
        with named_layer(names[0]):
            sizes[tuple(names)] = measured(ranks[names[0]], features)
    return sizes


def measure_learner_bytes(
    make_learner: Callable[[int], LayerLearner], rank: int, features: int, converging: bool
) -> int:
    """Return the bytes that a learner of float32 rows holds while a batch is read: two states.

    Measured on random rows, as the learner may be of any class.

    Examples
    --------
    >>> from ipa_core import ExactCovariance
    >>> measure_learner_bytes(ExactCovariance, 2, 100, False) > 2 * 4 * 100 * 100
    True
    """
    learner, largest = make_learner(rank), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(0, max(4200, 10 * rank), _UPDATE_ROWS):  # two blocks of the largest size
        learner.update(torch.randn(_UPDATE_ROWS, features, generator=generator, device="cpu"))
        arrays = learner.state_dict().values()
        largest = max(largest, sum(x.nbytes for x in arrays if isinstance(x, torch.Tensor)))
    projectors = 2 * 4 * rank * features if converging else 0
    return 2 * (largest + projectors)


def _groups_by_input(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    batch: Any,
    run: Forward,
    source: Source,
) -> list[tuple[list[str], int]]:
    """Return groups of layers that share their inputs, with the number of features."""
    inputs = SharedInputTree(ranks, lambda rank: _ShapeProbe(), None)
    collector = ActivationCollector(
        layers,
        inputs,
        ActivationRows(model, None, max_patches=1),
        max_rows=None,
        drop_failed=True,
        source=source,
    )
    with eval_mode(model), collector, collector.batch(batch):
        run(model, batch)
    groups: dict[int, tuple[list[str], int]] = {}
    for number, (name, layer) in enumerate(layers.items()):
        node = inputs.node_of[name]
        if node.learner.features is None:
            groups[-1 - number] = [name], _features(name, layer, source)
        else:
            groups.setdefault(id(node), ([], node.learner.features))[0].append(name)
    return list(groups.values())


def _features(name: str, layer: nn.Module, source: Source) -> int:
    try:
        return features_of(layer) if source == "inputs" else outputs_of(layer)
    except LayerError as error:
        raise with_context(
            error, f"layer {name!r}, which the first batch does not reach"
        ) from error
