"""Update of a consumer by the input of a layer, finished while the device computes later layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from ipa_torch._capture.row_consumer import PendingRows, RowConsumer
from ipa_torch._capture.tensor_ids import storage_key
from ipa_torch._layers import async_device
from ipa_torch._layers.row_view import WeightedRows
from ipa_torch.errors import LayerError


@dataclass(frozen=True)
class AsyncUpdate:
    """Update that has begun; `finish` waits for the device, which computes the model meanwhile.

    Parameters
    ----------
    rows : torch.Tensor
        Rows of the input (n, features), often a view of it.
    version : int
        Version of the rows when the update began.
    pending : PendingRows
        Second half of the consumer's update.
    """

    rows: torch.Tensor
    version: int
    pending: PendingRows

    @classmethod
    def begin(cls, consumer: RowConsumer, rows: WeightedRows) -> Self:
        """Begin the update of a consumer by rows and weights."""
        with torch._C.DisableTorchFunction():  # modes of the model's code, or of its trace
            return cls(rows[0], _version(rows[0]), consumer.begin_update(*rows))

    @property
    def is_async(self) -> bool:
        """True if the device of the rows computes asynchronously to the host."""
        return async_device.is_async_device(self.rows.device)

    def finish(self) -> None:
        """Complete the update.

        Raises
        ------
        LayerError
            If the rows have changed since it began.
        """
        if _version(self.rows) != self.version:
            raise LayerError(
                "expected a layer that does not change its input, got a change in place; "
                "leave it out of the targets"
            )
        with torch._C.DisableTorchFunction():
            self.pending.finish()


def lasting_rows(activation: torch.Tensor, rows: WeightedRows) -> WeightedRows:
    """Return rows that the model cannot change before an update on their device is finished.

    Those of an asynchronous device that view the activation are copied.
    """
    x, weights = rows
    if async_device.is_async_device(x.device) and storage_key(x) == storage_key(activation):
        with torch._C.DisableTorchFunction():
            x = x.clone()
    return x, weights


def _version(tensor: torch.Tensor) -> int:
    """Return torch's count of the changes in place of a tensor; 0 in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
