"""What counts as an activation stream, and how it is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from typing import TypeAlias

from ipa_core._array import Array, is_array
from ipa_core.errors import StreamError

Batch: TypeAlias = "Array | tuple[Array, Array]"
ActivationStream: TypeAlias = "Array | Iterable[Batch] | str | PathLike[str]"

_ROWS_AT_A_TIME = 8192


def iterate(stream: ActivationStream) -> Iterator[tuple[Array, Array | None]]:
    """Yield (batch, weights or None) from anything that counts as an activation stream.

    Raises
    ------
    StreamError
        If the object, or an item of it, is none.

    Examples
    --------
    >>> import numpy as np
    >>> [batch.shape for batch, _ in iterate([np.ones((2, 3)), (np.ones((1, 3)), np.ones(1))])]
    [(2, 3), (1, 3)]
    """
    if is_array(stream):
        yield from _cut(stream)
        return
    if not isinstance(stream, Iterable):
        raise StreamError(
            "expected an array, an iterable of batches or a path as activation stream, "
            f"got {type(stream).__name__}"
        )
    for number, item in enumerate(stream):
        yield _pair(item, number)


def _cut(array: Array) -> Iterator[tuple[Array, None]]:
    """Cut an array along its first axis, so that a memory-mapped one is never read whole."""
    if array.ndim < 2:
        yield array, None
        return
    for start in range(0, array.shape[0], _ROWS_AT_A_TIME):
        yield array[start : start + _ROWS_AT_A_TIME, ...], None


def _pair(item: Batch, number: int) -> tuple[Array, Array | None]:
    if is_array(item):
        return item, None
    if isinstance(item, (tuple, list)) and 1 <= len(item) <= 2 and all(map(is_array, item)):
        return (item[0], item[1] if len(item) == 2 else None)
    raise StreamError(
        f"expected batch {number} to be an array or a pair (batch, weights), "
        f"got {type(item).__name__}"
    )
