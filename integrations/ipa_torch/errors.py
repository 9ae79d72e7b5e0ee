"""What can go wrong with the layers of a model."""

from __future__ import annotations

from typing import Any, get_args

from ipa_core.errors import IPAError, SettingError


class LayerError(IPAError, LookupError):
    """A layer is not there, was never run, or is of a kind that cannot do what is asked."""

    page = "docs/torch.md#limits"


class PeerError(IPAError, RuntimeError):
    """Another process of a distributed run failed; the message says which, and with what."""

    page = "docs/scaling.md"


def check_choice(name: str, value: str, choices: Any) -> None:
    """Hold an argument against the ``Literal`` that lists what it may be.

    Raises
    ------
    SettingError
        If it is something else.
    """
    if value not in get_args(choices):
        listed = " or ".join(map(repr, get_args(choices)))
        raise SettingError(f"expected {name} to be {listed}, got {value!r}")
