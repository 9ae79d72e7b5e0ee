"""Validation of a batch and its weights, and of learners that are to be merged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ipa_core import _array, _sparse_rows, _torch_modes
from ipa_core._array import Array, DType, HostArray, Namespace
from ipa_core._weight_validation import host_weights
from ipa_core.errors import (
    ArrayTypeError,
    NonFiniteError,
    RankError,
    SettingError,
    ShapeError,
)
from ipa_core.learners._row_blocks import Rows


def template_of(batch: Array, rank: int) -> Array:
    """Return a (0, features) array that records library, device, dtype and features.

    Raises
    ------
    RankError
        If the batch has fewer features than the rank.
    """
    with _torch_modes.isolated(batch):
        xp, features = _form_of(batch)
        values = _sparse_rows.stored(batch)
        dtype = _array.state_dtype(xp, values)
        template = xp.zeros((0, features), dtype=dtype, device=_array.device(values))
    if rank > features:
        raise RankError(
            f"expected a rank of at most {features}, the number of features, got {rank}; "
            "ask for a smaller rank"
        )
    return template


def validate(
    batch: Array, weights: Array | None, template: Array, uncast: DType | None = None
) -> PendingBatch:
    """Check a batch against the template; return its rows of positive weight.

    Rows of weight zero are dropped first, whatever their values; weights that are all 1 become
    None. The rows get the dtype of the template unless they have the dtype ``uncast``.
    """
    xp = match(batch, template)
    count = math.prod(batch.shape[:-1])
    x, held = _as_rows(xp, batch, count), None
    if weights is not None:
        held = host_weights(weights, tuple(batch.shape[:-1]), template.dtype)
        x, held = _drop_absent(xp, x, held)
    device = _array.device(template)
    on_device = None if held is None else _array.from_numpy(xp, held, device, template.dtype)
    if _sparse_rows.is_sparse(x):
        x = x.astype(template.dtype)
    elif uncast is None or x.dtype != uncast:
        x = _array.cast(xp, x, template.dtype)
    return PendingBatch(xp, x, template.dtype, on_device, held)


def _as_rows(xp: Namespace, batch: Array, count: int) -> Array:
    """Return a batch as rows (count, features)."""
    if _sparse_rows.is_sparse(batch):
        return batch
    return xp.reshape(_array.detached(batch), (count, batch.shape[-1]))


@dataclass(frozen=True)
class PendingBatch:
    """Batch of valid form; whether its rows are finite shows in their squared norms."""

    xp: Namespace
    x: Array
    dtype: DType
    weights: Array | None
    host_weights: HostArray | None

    @property
    def count(self) -> int:
        return int(self.x.shape[0])

    def result(self, squares: HostArray) -> Rows:
        """Return the rows, given their squared norms.

        Raises
        ------
        NonFiniteError
            If the rows are not finite, or their squares over- or underflow the dtype.
        """
        held = _array.host_ones(squares.size) if self.host_weights is None else self.host_weights
        rows = Rows(self.x, self.weights, squares, held)
        _check_range(self.xp, rows, self.dtype)
        return rows


def _form_of(batch: Array) -> tuple[Namespace, int]:
    """Return library and number of features of a batch, if its form is valid."""
    xp = _array.check_array(_sparse_rows.stored(batch))
    _array.check_materialized(batch)
    if batch.ndim < 1 or batch.shape[-1] < 1:
        raise ShapeError(f"expected a batch of shape (..., features), got {tuple(batch.shape)}")
    return xp, int(batch.shape[-1])


def match(batch: Array, template: Array) -> Namespace:
    """Return a batch's library; raise if features, library or device differ from the template's."""
    xp, features = _form_of(batch)
    if features != template.shape[1]:
        raise ShapeError(
            f"expected batches of {template.shape[1]} features like the first one, got {features}"
        )
    same_library, values = xp is _array.namespace(template), _sparse_rows.stored(batch)
    if not same_library or _array.device(values) != _array.device(template):
        raise ArrayTypeError(
            f"expected batches like the first one, {_array.describe(template)}, "
            f"got {_array.describe(values)}"
        )
    return xp


def check_mergeable(first: object, second: object, settings: Iterable[str]) -> None:
    """Check that two learners are of one class and equal in some settings.

    Raises
    ------
    SettingError
        If they differ.
    """
    if type(second) is not type(first):
        raise SettingError(
            f"expected a {type(first).__name__} to merge with, got {type(second).__name__}"
        )
    for name in settings:
        if getattr(first, name) != getattr(second, name):
            raise SettingError(
                f"expected learners of equal {name} to merge, got {getattr(first, name)!r} "
                f"and {getattr(second, name)!r}"
            )


def _drop_absent(xp: Namespace, x: Array, weights: HostArray) -> tuple[Array, HostArray | None]:
    """Return the rows of positive weight with their weights, None for weights that are all 1."""
    if not weights.all():
        (present,) = weights.nonzero()
        if _sparse_rows.is_sparse(x):
            x = x[present]
        else:
            x = xp.take(x, _array.index_array(xp, present, _array.device(x)), axis=0)
        weights = weights[present]
    return x, None if (weights == 1).all() else weights


def _check_range(xp: Namespace, rows: Rows, dtype: DType) -> None:
    """Raise if rows are not finite, or if their squares over- or underflow the dtype."""
    energy = float(rows.squares.sum())
    # Lengths are squared on the host, in float64; products of rows are taken in their dtype.
    in_range = rows.squares.max(initial=0.0) <= float(xp.finfo(dtype).max)
    if not (in_range and math.isfinite(rows.energy())):
        bad = _count_not_finite(xp, rows.x)
        if bad:
            raise NonFiniteError(
                f"expected finite values, got NaN or infinity in {bad} of {rows.count} rows; "
                "give such rows weight 0, or correct their source"
            )
        raise NonFiniteError(
            f"expected rows whose squares {dtype} can hold, got an overflow; "
            "scale the data down or pass float64"
        )
    least = float(xp.finfo(dtype).smallest_normal) / float(xp.finfo(dtype).eps)
    if energy < least * rows.count and bool(xp.any(_sparse_rows.stored(rows.x) != 0)):
        raise NonFiniteError(
            f"expected rows whose squares {dtype} can hold, got an underflow; "
            "scale the data up or pass float64"
        )


def _count_not_finite(xp: Namespace, x: Array) -> int:
    """Return how many rows hold values that are not finite."""
    if _sparse_rows.is_sparse(x):
        return _sparse_rows.rows_not_finite(x)
    return int(xp.count_nonzero(~xp.all(xp.isfinite(x), axis=1)))
