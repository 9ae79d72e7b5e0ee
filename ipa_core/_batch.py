"""From what a caller passes to rows: every check of a batch is here."""

from __future__ import annotations

import math

from ipa_core import _array
from ipa_core._array import Array, Namespace
from ipa_core._rows import Rows
from ipa_core.errors import ArrayTypeError, NonFiniteError, ShapeError, WeightError


def template_of(batch: Array) -> Array:
    """Return the (0, features) array that stands for library, device, dtype and features."""
    xp = _array.namespace(batch)
    if not _array.is_floating(xp, batch):
        raise ArrayTypeError(
            f"expected a batch of a real floating dtype, got {batch.dtype}; "
            "convert it to float32 first"
        )
    if batch.ndim < 1 or batch.shape[-1] < 1:
        raise ShapeError(f"expected a batch of shape (..., features), got {tuple(batch.shape)}")
    return xp.zeros(
        (0, int(batch.shape[-1])),
        dtype=_array.state_dtype(xp, batch),
        device=_array.device(batch),
    )


def accept(batch: Array, weights: Array | None, template: Array) -> Rows:
    """Hold a batch to the template and return its rows of positive weight.

    Rows of weight zero are dropped before anything else, whatever they hold; weights that are all
    one are forgotten. What is not finite is refused: the squared lengths, needed anyway, tell.
    """
    _match(template_of(batch), template)
    xp = _array.namespace(batch)
    count = math.prod(batch.shape[:-1])
    x = xp.reshape(_array.detached(batch), (count, batch.shape[-1]))
    if weights is not None:
        x, weights = _drop_absent(xp, x, _flat(batch, weights, template))
    x = _array.cast(xp, x, template.dtype)
    with _array.silent():
        rows = Rows(x, weights, _array.row_squares(xp, x))
        _check_range(xp, rows)
    return rows


def _match(got: Array, template: Array) -> None:
    if got.shape != template.shape:
        raise ShapeError(
            f"expected batches of {template.shape[1]} features as the first one had, "
            f"got {got.shape[1]}"
        )
    same_library = _array.namespace(got) is _array.namespace(template)
    if not same_library or _array.device(got) != _array.device(template):
        raise ArrayTypeError(
            f"expected batches as the first one, {_array.describe(template)}, "
            f"got {_array.describe(got)}"
        )


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


def _drop_absent(xp: Namespace, x: Array, weights: Array) -> tuple[Array, Array | None]:
    if x.shape[0] == 0:
        return x, None
    if not (bool(xp.all(weights >= 0)) and math.isfinite(_array.wide_sum(xp, weights))):
        raise WeightError("expected finite weights of at least 0, got negative or non-finite ones")
    present = weights > 0
    if not bool(xp.all(present)):
        (index,) = xp.nonzero(present)
        x, weights = xp.take(x, index, axis=0), xp.take(weights, index)
    return x, None if bool(xp.all(weights == 1)) else weights


def _check_range(xp: Namespace, rows: Rows) -> None:
    """Refuse rows that are not finite, or whose squares over- or underflow the dtype."""
    dtype = rows.x.dtype
    energy = _array.wide_sum(xp, rows.squares)
    if not (math.isfinite(energy) and math.isfinite(rows.energy(xp))):
        bad = int(xp.count_nonzero(~xp.all(xp.isfinite(rows.x), axis=1)))
        if bad:
            raise NonFiniteError(
                f"expected finite values, got NaN or infinity in {bad} of {rows.count} rows; "
                "give such rows weight 0 or mend what makes them"
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
