"""Buffer of rows in half precision on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ipa_core.errors import NonFiniteError


class RowBuffer:
    """Buffer of rows in half precision on the host."""

    passes = 1

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._parts: tuple[tuple[torch.Tensor, torch.Tensor | None], ...] = ()
        self.samples = 0
        self.bytes = 0

    def begin_update(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> _PendingCopy:
        """Copy the rows; `_PendingCopy.finish` checks and adds them."""
        # A copy also without a conversion: the model may change its input later.
        return _PendingCopy(self, rows.to(self._dtype, copy=True).cpu(), weights)

    def add(self, rows: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Add rows on the host.

        Raises
        ------
        NonFiniteError
            If a value is not finite.
        """
        finite = torch.isfinite(rows).all(1)
        if not bool(finite.all()):
            raise NonFiniteError(
                f"expected finite values within the range of {self._dtype}, got others in "
                f"{int((~finite).sum())} of {len(rows)} rows; store bfloat16, or check the model"
            )
        weights = None if weights is None else weights.to(torch.float32).cpu()
        self._parts += ((rows, weights),)
        self.samples += rows.shape[0]
        self.bytes += rows.nbytes + (0 if weights is None else weights.nbytes)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all rows, and their weights unless all are 1."""
        tensors = {"rows": torch.cat([rows for rows, _ in self._parts])}
        if any(weights is not None for _, weights in self._parts):
            tensors["weights"] = torch.cat(
                [
                    torch.ones(len(rows), device="cpu") if weights is None else weights
                    for rows, weights in self._parts
                ]
            )
        return tensors


@dataclass(frozen=True)
class _PendingCopy:
    """Copy of rows for a buffer."""

    buffer: RowBuffer
    rows: torch.Tensor
    weights: torch.Tensor | None

    def finish(self) -> None:
        self.buffer.add(self.rows, self.weights)
