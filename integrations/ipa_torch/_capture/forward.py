"""Forward pass of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn

from ipa_core.errors import StreamError
from ipa_core.settings import check_callable, check_iterable
from ipa_torch._capture.batch_device import device_of, on_device

Forward: TypeAlias = Callable[[nn.Module, Any], object]


def resolve_forward(forward: Forward | None) -> Forward:
    """Return the function that runs a model on a batch.

    Raises
    ------
    SettingError
        If ``forward`` is neither None nor callable.
    """
    if forward is None:
        return default_forward
    check_callable("forward", forward, cure="pass a function of model and batch, or None")
    return forward


def check_batches(batches: Any) -> None:
    """Check that a value is an iterable of batches and no batch by itself.

    Raises
    ------
    StreamError
        If it is not.
    """
    form, cure = "an iterable, such as a list or a DataLoader", "put a single batch into a list"
    check_iterable("batches", batches, form, cure=cure, error=StreamError)
    if isinstance(batches, (Mapping, nn.Module)):
        raise StreamError(f"expected batches as {form}, got a {type(batches).__name__}; {cure}")


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
