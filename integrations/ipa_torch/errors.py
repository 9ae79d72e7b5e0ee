"""Errors about the layers of a model and about other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ipa_core.errors import IPAError, with_context


class LayerError(IPAError, LookupError):
    """A layer is missing, never ran, or is of an unsupported class."""

    page = "docs/torch.md#limits"


class PeerError(IPAError, RuntimeError):
    """Another rank of a distributed run failed; the message has its number and its error."""

    page = "docs/scaling.md"


@contextmanager
def named_layer(name: str) -> Iterator[None]:
    """Add the name of a layer to errors."""
    try:
        yield
    except IPAError as error:
        raise with_context(error, f"layer {name!r}") from error
