"""Forward pass of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn

from ipa_torch._capture.batch_device import device_of, on_device

Forward: TypeAlias = Callable[[nn.Module, Any], object]


def default_forward(model: nn.Module, batch: Any) -> None:
    """Call a model with a batch: keywords of a mapping, items of a tuple or list, or the batch."""
    batch = on_device(batch, device_of(model))
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, (tuple, list)):
            model(*batch)
        else:
            model(batch)
    except TypeError as error:
        # Most often a loader of (input, label) pairs and a model of inputs only.
        error.add_note(
            "The model was called with the batch: a mapping as keywords, a tuple or list by "
            "position. Pass forward=lambda model, batch: ... for another call."
        )
        raise
