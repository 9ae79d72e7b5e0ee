"""Validation of a batch and its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ipa_core import _array
from ipa_core._array import Array, HostArray, Namespace
from ipa_core.errors import ArrayTypeError, NonFiniteError, ShapeError, WeightError
from ipa_core.learners._row_blocks import Rows


def template_of(batch: Array) -> Array:
    """Return a (0, features) array that records library, device, dtype and features."""
    xp, features = _form_of(batch)
    dtype = _array.state_dtype(xp, batch)
    return xp.zeros((0, features), dtype=dtype, device=_array.device(batch))


def validate(batch: Array, weights: Array | None, template: Array) -> PendingBatch:
    """Check a batch against the template; return its rows of positive weight.

    Rows of weight zero are dropped first, whatever their values; weights that are all 1 become
    None.
    """
    xp = match(batch, template)
    count = math.prod(batch.shape[:-1])
    x, host_weights = xp.reshape(_array.detached(batch), (count, batch.shape[-1])), None
    if weights is not None:
        x, weights, host_weights = _drop_absent(xp, x, _flat(batch, weights, template))
    x = _array.cast(xp, x, template.dtype)
    return PendingBatch(xp, x, weights, host_weights)


@dataclass(frozen=True)
class PendingBatch:
    """Batch of valid form; whether its rows are finite shows in their squared norms."""

    xp: Namespace
    x: Array
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
        host_weights = (
            _array.host_ones(squares.size) if self.host_weights is None else self.host_weights
        )
        rows = Rows(self.x, self.weights, squares, host_weights)
        _check_range(self.xp, rows)
        return rows


def _form_of(batch: Array) -> tuple[Namespace, int]:
    """Return library and number of features of a batch, if its form is valid."""
    xp = _array.namespace(batch)
    if not _array.is_floating(xp, batch):
        raise ArrayTypeError(
            f"expected a batch of a real floating dtype, got {batch.dtype}; "
            "convert it to float32 first"
        )
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
    same_library = xp is _array.namespace(template)
    if not same_library or _array.device(batch) != _array.device(template):
        raise ArrayTypeError(
            f"expected batches like the first one, {_array.describe(template)}, "
            f"got {_array.describe(batch)}"
        )
    return xp


def _flat(batch: Array, weights: Array, template: Array) -> Array:
    """Return the weights as a vector of the template's dtype."""
    xp = _array.namespace(batch, weights)
    if tuple(weights.shape) != tuple(batch.shape[:-1]):
        raise ShapeError(
            f"expected weights of shape {tuple(batch.shape[:-1])}, one for each row, "
            f"got {tuple(weights.shape)}"
        )
    flat = xp.reshape(_array.detached(weights), (math.prod(weights.shape),))
    return _array.cast(xp, flat, template.dtype)


def _drop_absent(
    xp: Namespace, x: Array, weights: Array
) -> tuple[Array, Array | None, HostArray | None]:
    host_weights = _array.on_host(weights)
    if not ((host_weights >= 0).all() and math.isfinite(host_weights.sum())):
        raise WeightError("expected finite weights of at least 0, got negative or non-finite ones")
    if not host_weights.all():
        (present,) = host_weights.nonzero()
        index = _array.from_numpy(xp, present, _array.device(x), xp.int64)
        x, weights = xp.take(x, index, axis=0), xp.take(weights, index)
        host_weights = host_weights[present]
    return (x, None, None) if (host_weights == 1).all() else (x, weights, host_weights)


def _check_range(xp: Namespace, rows: Rows) -> None:
    """Raise if rows are not finite, or if their squares over- or underflow the dtype."""
    dtype = rows.x.dtype
    energy = float(rows.squares.sum())
    # Lengths are squared on the host, in float64; products of rows are taken in their dtype.
    in_range = rows.squares.max(initial=0.0) <= float(xp.finfo(dtype).max)
    if not (in_range and math.isfinite(rows.energy())):
        bad = int(xp.count_nonzero(~xp.all(xp.isfinite(rows.x), axis=1)))
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
    if energy < least * rows.count and bool(xp.any(rows.x != 0)):
        raise NonFiniteError(
            f"expected rows whose squares {dtype} can hold, got an underflow; "
            "scale the data up or pass float64"
        )
