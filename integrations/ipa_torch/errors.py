"""What can go wrong with the layers of a model."""

from __future__ import annotations

from ipa_core.errors import IPAError


class LayerError(IPAError, LookupError):
    """A layer is not there, was never run, or is of a kind that cannot do what is asked."""
