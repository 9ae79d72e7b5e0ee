"""Fit a projector to a stream of activations."""

from __future__ import annotations

from collections.abc import Callable

from ipa_core.errors import IPAError, StreamError, with_context
from ipa_core.io.streams import ActivationStream, is_one_shot, labeled_batches
from ipa_core.learners.base import Learner
from ipa_core.learners.factory import make_learner
from ipa_core.learners.randomized_svd import RandomizedSVD
from ipa_core.projector import Projector


def fit_projector(
    activation_stream: ActivationStream,
    rank: int,
    *,
    learner: Callable[[int], Learner] = RandomizedSVD,
) -> Projector:
    r"""Learn the projection of ``rank`` directions with the least reconstruction error.

    .. math:: \min_{P P^\top = I_r} \sum_i w_i \|x_i - P^\top P x_i\|^2

    Parameters
    ----------
    activation_stream : array, iterable of batches, or path
        An array (..., features), a Dask array too; an iterable of batches, of pairs (batch,
        weights) or of paths, for example a list, a generator or a torch ``DataLoader``; a sparse
        matrix or a data frame; a file (NumPy, safetensors, Zarr, HDF5, Parquet, Arrow), an array
        of it (``FILE#NAME``) or a folder. See `ipa_core.io.streams`. A Dask
        array is learned on its cluster, as are shards with `ipa_core.dask_backend.fit_projector`.
    rank : int
        Number of directions, between 1 and the number of features.
    learner : callable, default `RandomizedSVD`
        Factory, rank -> `Learner`: a `Learner` class, or ``functools.partial`` of a class with
        settings.

    Returns
    -------
    Projector
        In the library, on the device and in the dtype (float32 at least) of the batches.

    Raises
    ------
    StreamError
        If the object is not an activation stream, or can be read only once and the learner needs
        several passes.
    EmptyStreamError
        If the stream yields no row of positive weight.
    SettingError
        If ``learner`` does not make a learner.
    FileFormatError, PathError
        If a file is damaged, of another kind, or cannot be read; the message has its path.
    ArrayTypeError, ShapeError, RankError, WeightError, NonFiniteError
        If a batch is not valid; the message has its number, or its file, tensor and rows.

    Notes
    -----
    Cost for n rows of d features with the default learner: time O(4 k n d) operations,
    memory O(4 k d) numbers and one batch; k is 2r + 8, rounded up to a multiple of 16. Up to
    2 k features the exact second moment is kept instead, for about as much.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> stream = (rng.standard_normal((64, 100)) / np.arange(1, 101) for _ in range(20))
    >>> fit_projector(stream, rank=8)
    Projector(rank=8, features=100, captured=0.932, samples=1280, numpy float64 on cpu)
    """
    if hasattr(activation_stream, "__dask_graph__") and not isinstance(activation_stream, type):
        # Imported here: only callers with a Dask array have Dask.
        from ipa_core import dask_backend

        return dask_backend.fit_projector(activation_stream, rank, learner=learner)
    return _learn(activation_stream, make_learner(learner, rank))


def _learn(stream: ActivationStream, learner: Learner) -> Projector:
    """Make the learner's passes over the stream; return its projector."""
    if learner.passes > 1 and is_one_shot(stream):
        raise StreamError(
            f"expected a stream that can be read {learner.passes} times, as "
            f"{type(learner).__name__} asks for, got a one-shot {type(stream).__name__}; "
            "pass a list, an array, a path or a DataLoader, or ask for one pass"
        )
    for _ in range(learner.passes):
        for label, batch, weights in labeled_batches(stream, keep_sparse=True):
            try:
                learner.update(batch, weights)
            except IPAError as error:
                raise with_context(error, label) from error
    return learner.finalize()
