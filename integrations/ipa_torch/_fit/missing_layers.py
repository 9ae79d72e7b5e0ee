"""Report of target layers without a projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from ipa_core.caller_warnings import warn_caller
from ipa_torch.errors import LayerError
from ipa_torch.layer_projectors import LayerMapping

OnMissing: TypeAlias = Literal["warn", "raise", "ignore"]


def report_missing(
    learned: LayerMapping[Any], on_missing: OnMissing, noun: str = "projector"
) -> None:
    """Warn about target layers without a projector, or learner, or raise.

    Raises
    ------
    LayerError
        If a layer is missing and ``on_missing`` is "raise", or if all are.
    """
    missing = learned.missing
    if not missing or (on_missing == "ignore" and len(learned)):
        return
    message = (
        f"expected a {noun} for every layer, got none for {len(missing)} "
        f"({_by_reason(missing)}); leave them out of the targets, or feed batches that reach them"
    )
    if on_missing == "raise" or not len(learned):
        raise LayerError(message)
    warn_caller(message)


def _by_reason(missing: Mapping[str, str]) -> str:
    """Return the layers grouped by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in missing.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{_shortened(names)}: {reason}" for reason, names in by_reason.items())


def _shortened(names: Sequence[str], limit: int = 3) -> str:
    """Return the first few names: a model may lack dozens for one reason."""
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
