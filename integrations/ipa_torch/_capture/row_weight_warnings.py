"""Warnings of row weights that do not apply to the inputs of a layer, or may apply transposed."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ipa_core.caller_warnings import warn_caller

Shape = tuple[int, ...]

_SHOWN = 3


class RowWeightWarnings:
    """Record of the layers whose inputs do not have the rows of the weights, or may not.

    Layers with the same input are represented by one of them.
    """

    def __init__(self) -> None:
        self._unmatched: dict[str, Shape] = {}
        self._square: dict[str, Shape] = {}
        self._known: set[str] = set()
        self._warned = False

    def match(self, name: str, row_shape: Shape, *, symmetric: bool) -> None:
        """Record a layer to whose input the weights apply.

        Parameters
        ----------
        name : str
            The layer.
        row_shape : tuple of int
            The shape of its rows.
        symmetric : bool
            Whether the weights are equal to their transpose.
        """
        if name in self._known or len(row_shape) != 2 or min(row_shape) == 1:
            return
        if row_shape[0] != row_shape[1]:
            self._mark_known(name)
        elif not symmetric:
            self._square[name] = row_shape

    def miss(self, name: str, row_shape: Shape, weight_shapes: Iterable[Shape]) -> None:
        """Record a layer to whose input none of the weights applies, unless it is pooled."""
        lengths = {length for shape in weight_shapes for length in shape}
        pooled = math.prod(row_shape[1:]) == 1 and row_shape[0] in lengths
        if not pooled:  # to one row for each item of the batch
            self._unmatched.setdefault(name, row_shape)
            self._mark_known(name)

    def _mark_known(self, name: str) -> None:
        """Record that a batch has told the axes of a layer's input apart."""
        self._known.add(name)
        self._square.pop(name, None)

    def end_batch(self, weight_shapes: Iterable[Shape]) -> None:
        """Warn after the first batch with layers to which no weights apply."""
        if not self._unmatched or self._warned:
            return
        self._warned = True
        shapes = list(dict.fromkeys(weight_shapes))
        transposed = {shape[::-1] for shape in shapes if len(shape) == 2}
        reversed_ = all(shape in transposed for shape in self._unmatched.values())
        cure = (
            "if these are (positions, batch), let row_weights return the weights transposed"
            if reversed_
            else "let row_weights return a list of weights, with weights of this shape as well (of "
            "ones, if there is no padding)"
        )
        warn_caller(
            f"expected layer inputs with rows of shape {_or(shapes)}, as the row weights have, got "
            f"{_or(dict.fromkeys(self._unmatched.values()))} in {_names(self._unmatched)}: all of "
            f"these rows count, also padding; {cure}",
        )

    def close(self) -> None:
        """Warn about layers for which no batch told batch and positions apart."""
        if self._square:
            warn_caller(
                "expected row weights whose shape tells batch and positions apart in one batch at "
                f"least, got only {_or(dict.fromkeys(self._square.values()))} for "
                f"{_names(self._square)}: taken as (batch, positions); add a batch of another "
                "size, or transpose the weights if these layers see positions first",
            )
            self._square.clear()


def _or(shapes: Iterable[Shape]) -> str:
    return " or ".join(map(str, shapes))


def _names(layers: dict[str, Shape]) -> str:
    shown = ", ".join(repr(name) for name in list(layers)[:_SHOWN])
    more = len(layers) - _SHOWN
    return f"layers {shown}" + (f" and {more} more" if more > 0 else "")
