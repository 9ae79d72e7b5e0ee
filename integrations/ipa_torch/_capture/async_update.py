"""Update of a consumer by the input of a layer, finished while the device computes later layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from ipa_torch._capture.row_consumer import PendingRows, RowConsumer
from ipa_torch._capture.tensor_ids import storage_key
from ipa_torch._layers import async_device
from ipa_torch._layers.row_view import WeightedRows


@dataclass(frozen=True)
class AsyncUpdate:
    """Update that has begun; `finish` waits for the device, which computes the model meanwhile.

    Parameters
    ----------
    is_async : bool
        True if the device of the rows computes asynchronously to the host.
    pending : PendingRows
        Second half of the consumer's update.
    """

    is_async: bool
    pending: PendingRows

    @classmethod
    def begin(cls, consumer: RowConsumer, activation: torch.Tensor, rows: WeightedRows) -> Self:
        """Begin the update of a consumer by rows, which may view an activation, and weights.

        On an asynchronous device rows that view the activation are copied: the model may change it
        before the update is finished.
        """
        x, weights = rows
        is_async = async_device.is_async_device(x.device)
        with torch._C.DisableTorchFunction():  # modes of the model's code, or of its trace
            if is_async and storage_key(x) == storage_key(activation):
                x = x.clone()
            return cls(is_async, consumer.begin_update(x, weights))

    def finish(self) -> None:
        """Complete the update."""
        with torch._C.DisableTorchFunction():
            self.pending.finish()
