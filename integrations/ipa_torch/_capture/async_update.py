"""Update of a consumer by the input of a layer, in two halves around the layer's forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from ipa_torch._capture.row_consumer import PendingRows, RowConsumer
from ipa_torch._layers.row_view import WeightedRows
from ipa_torch.errors import LayerError


@dataclass(frozen=True)
class AsyncUpdate:
    """Update that has begun; `finish` waits for the device, which computes the layer meanwhile.

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


def is_async_device(device: torch.device) -> bool:
    """Return whether a device computes asynchronously to the host."""
    return device.type != "cpu"


def _version(tensor: torch.Tensor) -> int:
    """Return torch's count of the changes in place of a tensor; 0 in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
