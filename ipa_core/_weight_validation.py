"""Validation of row weights."""

from __future__ import annotations

import math

from ipa_core import _array
from ipa_core._array import Array, DType, HostArray
from ipa_core.errors import ArrayTypeError, ShapeError, WeightError


def host_weights(weights: Array, shape: tuple[int, ...], dtype: DType) -> HostArray:
    """Return row weights of any library and device, rounded to ``dtype``, as a host vector.

    Raises
    ------
    ArrayTypeError
        If they are not an array, or a tensor without values in this process.
    ShapeError
        If they are not of ``shape``.
    WeightError
        If they are integers, negative or not finite.
    """
    xp = _array.namespace(weights)
    if not xp.isdtype(weights.dtype, "bool"):
        check_dtype(weights)
    if tuple(weights.shape) != shape:
        raise ShapeError(
            f"expected weights of shape {shape}, one for each row, got {tuple(weights.shape)}"
        )
    _array.check_materialized(weights)
    flat = _array.rounded(_array.on_host(_array.detached(weights)).reshape(-1), dtype)
    if not ((flat >= 0).all() and math.isfinite(flat.sum())):
        raise WeightError("expected finite weights of at least 0, got negative or non-finite ones")
    return flat


def check_dtype(weights: Array) -> None:
    """Refuse integers, which are labels as often as weights, and everything that is not real."""
    if _array.namespace(weights).isdtype(weights.dtype, "integral"):
        raise WeightError(
            f"expected boolean or floating weights, got {weights.dtype}; pass weights.bool() or "
            "weights != 0 for a mask, weights.float() for importances; for labels pass the rows "
            "alone: (x for x, _ in loader)"
        )
    try:
        _array.check_array(weights)
    except ArrayTypeError as error:
        raise WeightError(f"weights: {error}") from error
