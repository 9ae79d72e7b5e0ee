"""Dask backend: learn from arrays and shards larger than one machine's memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from ipa_core.errors import IPAError, StreamError, with_context
from ipa_core.io.activation_files import files_of
from ipa_core.io.activation_store import StoredLayer
from ipa_core.io.prefetch import prefetch
from ipa_core.io.streams import labeled_batches
from ipa_core.learners.base import Learner
from ipa_core.learners.factory import make_learner
from ipa_core.learners.randomized_svd import RandomizedSVD
from ipa_core.optional_dependencies import dependency_error
from ipa_core.projector import Projector

try:
    import dask.array
    from dask import core
    from dask.base import compute, is_dask_collection, optimize
    from dask.delayed import delayed
    from dask.local import get_sync
    from dask.optimization import cull
    from dask.system import CPU_COUNT
except Exception as error:  # a clash of versions raises AttributeError and others
    raise dependency_error(
        error, "dask.array", extra="dask", user="ipa_core.dask_backend"
    ) from error

Shards: TypeAlias = "str | PathLike[str] | Iterable[str | PathLike[str]] | StoredLayer"


def fit_projector(
    source: Any | Shards, rank: int, *, learner: Callable[[int], Learner] = RandomizedSVD
) -> Projector:
    """Learn a projection as `ipa_core.fit_projector` does, on a Dask cluster.

    Consecutive blocks or shards form two runs for each thread of the cluster. A run has one
    learner, which absorbs the blocks in order, where they are stored; the learners are then merged
    in a binary tree. If a worker is lost, Dask repeats its runs.

    Parameters
    ----------
    source : dask.array.Array, path, iterable of paths, or StoredLayer
        An array (..., features), any chunks; or shards that every worker can read: ``.npy``,
        ``.safetensors``, ``.zarr``, a folder of them, or a layer of an `ActivationStore`. A file is
        read by a single task.
    rank : int
        Number of directions.
    learner : callable, default `RandomizedSVD`
        Factory, rank -> `Learner`; the learner must need a single pass.

    Returns
    -------
    Projector
        NumPy, or the library of the array's blocks.

    Raises
    ------
    StreamError
        If the source is none of these, or the learner needs several passes.
    EmptyStreamError
        If there are no rows of positive weight.
    ArrayTypeError, ShapeError, RankError, NonFiniteError, FileFormatError
        If a block is not valid; the message has its number or path.

    Notes
    -----
    Memory of a worker, for each thread: one learner and one block, or 8,192 rows of a file. The
    number of runs depends on the cluster's threads, so results of two clusters may differ within
    the learner's guarantee. Without a cluster, Dask's local threads are used.

    Examples
    --------
    >>> import dask.array as da
    >>> from ipa_core import fit_projector
    >>> x = da.random.default_rng(0).standard_normal((4000, 20), chunks=(500, 20))
    >>> fit_projector(x / da.arange(1, 21), rank=2)
    Projector(rank=2, features=20, captured=0.783, samples=4000, numpy float64 on cpu)
    """
    return _learn(source, make_learner(learner, rank))


def _learn(source: Any | Shards, learner: Learner) -> Projector:
    """Learn from the parts of a source in parallel runs; merge the runs in pairs."""
    if learner.passes > 1:
        raise StreamError(
            f"expected a learner of one pass on Dask, got a {type(learner).__name__} of "
            f"{learner.passes} passes; set epochs=1"
        )
    parts = _parts(source)
    if not parts:
        return learner.finalize()
    learners = [_learn_run(learner, run) for run in _split(parts, 2 * _threads())]
    while len(learners) > 1:
        pairs = [learners[start : start + 2] for start in range(0, len(learners), 2)]
        learners = [_merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    (merged,) = compute(*learners)  # type: ignore[no-untyped-call]
    projector: Projector = merged.finalize()
    return projector


def _parts(source: Any) -> list[tuple[str, Any]]:
    """Return (name, stream) pairs: blocks, paths or shards."""
    if isinstance(source, dask.array.Array):
        array: Any = source.rechunk({source.ndim - 1: -1})  # type: ignore[no-untyped-call]
        return [(f"block {number}", block) for number, block in enumerate(_blocks(array))]
    if isinstance(source, StoredLayer):
        return [(part.shards[0].file, part) for part in source.parts()]
    if isinstance(source, (str, PathLike)):
        source = [source]
    if not isinstance(source, Iterable) or is_dask_collection(source):
        raise StreamError(
            f"expected a Dask array or paths of shards, got {type(source).__name__}; "
            "a DataFrame has to_dask_array"
        )
    files = [file for path in source for file in files_of(path)]
    return [(str(file), str(file)) for file in files]


class _Block:
    """Block computed inside the task that learns from it.

    As a separate task, it would be computed early and held in memory.
    """

    def __init__(self, graph: dict[Any, Any], key: Any) -> None:
        self._graph = graph
        self._key = key

    def compute(self) -> Any:
        return get_sync(self._graph, self._key)


def _blocks(array: Any) -> list[Any]:
    """Return the blocks of an array: `_Block`, or delayed if a cluster holds data of the array."""
    if any(map(_is_future, dict(array.__dask_graph__()).values())):
        return list(array.to_delayed().ravel())
    (array,) = optimize(array)  # type: ignore[no-untyped-call]
    graph = dict(array.__dask_graph__())
    keys = core.flatten(array.__dask_keys__())  # type: ignore[no-untyped-call]
    return [_Block(cull(graph, [key])[0], key) for key in keys]  # type: ignore[no-untyped-call]


def _is_future(node: Any) -> bool:
    value = getattr(node, "value", node)
    return type(value).__module__.partition(".")[0] == "distributed"


def _threads() -> int:
    """Return the number of threads of the current Dask cluster, or of this machine."""
    try:
        from distributed import get_client

        client: Any = get_client()
        return sum(client.nthreads().values()) or 1
    except (ImportError, ValueError):
        return int(CPU_COUNT)


def _split(parts: list[Any], count: int) -> list[list[Any]]:
    """Divide a list into at most ``count`` runs of about equal length."""
    count = min(count, len(parts))
    borders = [len(parts) * number // count for number in range(count + 1)]
    return [parts[a:b] for a, b in zip(borders, borders[1:], strict=False)]


def _learn_run(learner: Learner, parts: list[tuple[str, Any]]) -> Any:
    """Return the task that learns from parts in order."""
    task: Any = learner
    following = [part if isinstance(part, str) else None for _, part in parts[1:]]
    for (name, part), next_file in zip(parts, [*following, None], strict=True):
        task = _absorb(task, part, name, next_file)
    return _compact(task)


@delayed(pure=False)  # type: ignore[untyped-decorator]
def _absorb(learner: Learner, stream: Any, name: str, next_file: str | None) -> Learner:
    updated = copy.copy(learner)
    if next_file is not None:
        prefetch(Path(next_file))
    stream = stream.compute() if isinstance(stream, _Block) else stream
    for label, batch, weights in labeled_batches(stream):
        try:
            updated.update(batch, weights)
        except IPAError as error:
            # The label of a file's rows has its path, that of a block's rows no number.
            context = label if name in label else name
            raise with_context(error, context) from error
    return updated


@delayed(pure=False)  # type: ignore[untyped-decorator]
def _compact(learner: Learner) -> Learner:
    return learner.compact()


@delayed(pure=False)  # type: ignore[untyped-decorator]
def _merge(left: Learner, right: Learner) -> Learner:
    return left.merge(right).compact()
