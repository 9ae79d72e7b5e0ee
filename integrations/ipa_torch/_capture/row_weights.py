"""Weights of an activation's rows, from the masks of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from ipa_core.errors import ArrayTypeError, ShapeError
from ipa_core.settings import check_callable
from ipa_torch._capture.hooks import Hook
from ipa_torch._capture.row_selection import RowSelection
from ipa_torch._capture.row_weight_warnings import RowWeightWarnings
from ipa_torch._capture.tensor_ids import Key, storage_key
from ipa_torch._layers.gather_memory import GatherMemory
from ipa_torch._layers.row_subset import RowSubset

Masks: TypeAlias = "torch.Tensor | list[torch.Tensor] | None"
Weights: TypeAlias = "Masks | tuple[Masks, Masks]"
RowWeights: TypeAlias = Callable[[Any], Weights]


class RowWeighter:
    """Row weights of each activation of the current batch.

    In an encoder-decoder model, activations up to and including the encoder's output use the
    encoder mask, all others the decoder mask.
    """

    def __init__(self, model: nn.Module, row_weights: RowWeights | None) -> None:
        if row_weights is not None:
            check_callable("row_weights", row_weights, cure="pass a function of the batch, or None")
        self._row_weights = row_weights
        self._encoder = _encoder_of(model)
        self._encoder_done = False
        self._encoder_output: Key | None = None
        self._memory = GatherMemory()
        self._first: list[RowSelection] = []
        self._second: list[RowSelection] = []
        self._warnings = RowWeightWarnings()

    def start(self, batch: Any) -> int | None:
        """Start a batch; return its number of rows of nonzero weight, or None without weights."""
        self._encoder_done = False
        weights = None if self._row_weights is None else self._row_weights(batch)
        first, second = _pair(weights) if isinstance(weights, tuple) else (weights, None)
        self._first, self._second = (_selections(part, self._memory) for part in (first, second))
        return self._first[0].rows if self._first else None

    @property
    def hooks(self) -> list[Hook]:
        """Hook at the end of the encoder, if there is one."""
        if self._encoder is None:
            return []
        return [Hook(None, self._encoder, self._encoder_hook, after=True)]

    def __call__(
        self, name: str, activation: torch.Tensor, row_shape: tuple[int, ...]
    ) -> RowSubset:
        """Return the positions of nonzero weight in the input of a layer, and their weights."""
        selections = self._second if self._is_of_decoder(activation) else self._first
        for selection in selections:
            if selection.fits(row_shape):
                self._note_match(name, selection, row_shape)
                return selection.on(activation.device)
        if not all(selection.trivial for selection in selections):
            self._warnings.miss(name, row_shape, [selection.shape for selection in selections])
        return RowSubset()

    def end_batch(self) -> None:
        """Warn about layers to whose inputs no weights apply, once."""
        self._warnings.end_batch(selection.shape for selection in (*self._first, *self._second))

    def close(self) -> None:
        """Warn about layers whose inputs the weights may fit transposed."""
        self._warnings.close()

    def _note_match(self, name: str, selection: RowSelection, row_shape: tuple[int, ...]) -> None:
        square = row_shape == selection.shape and len(set(row_shape)) == 1 < len(row_shape)
        self._warnings.match(name, row_shape, symmetric=not square or selection.symmetric)

    def _is_of_decoder(self, activation: torch.Tensor) -> bool:
        return self._encoder_done and storage_key(activation) != self._encoder_output

    def _encoder_hook(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._encoder_done = True
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        self._encoder_output = storage_key(hidden)


def _encoder_of(model: nn.Module) -> nn.Module | None:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = model.get_encoder()  # type: ignore[operator]
    return encoder if isinstance(encoder, nn.Module) else None


def _pair(weights: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the weights of encoder and decoder."""
    if len(weights) != 2:
        raise ShapeError(
            f"expected row weights of encoder and decoder as a pair, got {len(weights)} of them"
        )
    return weights[0], weights[1]


def _selections(weights: Any, memory: GatherMemory) -> list[RowSelection]:
    if weights is None:
        return []
    parts = weights if isinstance(weights, list) else [weights]
    for part in parts:
        if not isinstance(part, torch.Tensor):
            raise ShapeError(
                f"expected row weights as a tensor, got {type(part).__name__}; "
                "let row_weights return a tensor with a weight for each row, or None"
            )
        if part.is_meta or part.layout != torch.strided:
            raise ArrayTypeError(
                f"expected row weights as a dense tensor with values, got {part.layout} on "
                f"{part.device}"
            )
    return [RowSelection(part, memory) for part in parts]
