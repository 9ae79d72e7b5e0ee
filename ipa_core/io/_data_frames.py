"""Data frames of pandas or Polars as rows, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ipa_core._array import Array
from ipa_core.errors import ArrayTypeError


def is_frame(value: Any) -> bool:
    """Return whether a value is a data frame."""
    return hasattr(value, "to_numpy") and hasattr(value, "columns") and hasattr(value, "dtypes")


def frame_blocks(
    frame: Any, weights: Array | None, most_rows: int
) -> Iterator[tuple[Array, Array | None]]:
    """Yield the rows of a frame as NumPy arrays, each with its weights.

    Raises
    ------
    ArrayTypeError
        If a column does not hold floating numbers.
    """
    for name, dtype in zip(frame.columns, frame.dtypes, strict=True):
        if not str(dtype).lower().startswith(("float", "double")):
            raise ArrayTypeError(
                f"expected columns of floating numbers, got {dtype} in column {name!r}; "
                "select the columns that are features, or convert them"
            )
    for start in range(0, frame.shape[0], most_rows):
        part = slice(start, min(start + most_rows, frame.shape[0]))
        yield frame[part].to_numpy(), None if weights is None else weights[part]
