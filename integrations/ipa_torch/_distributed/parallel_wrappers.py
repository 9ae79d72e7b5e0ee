"""Models that DDP or FSDP wraps."""

from __future__ import annotations

from torch import nn

from ipa_core.errors import SettingError
from ipa_torch._layers.unwrap import check_model


def check_unwrapped(model: nn.Module) -> None:
    """Check that no data-parallel wrapper has taken the model's parameters already.

    Raises
    ------
    SettingError
        If one has: it would not reduce the gradients of new parameters, and ranks would drift.
    """
    check_model(model)
    parallel = nn.parallel.DistributedDataParallel
    wrapped = any(isinstance(module, parallel) for module in model.modules())
    if wrapped or is_sharded(model):
        kind = "DistributedDataParallel" if wrapped else "FSDP"
        raise SettingError(
            f"expected a model that is not wrapped yet, got one under {kind}, which does not know "
            "the adapter's parameters; attach or load all adapters first, then wrap"
        )


def is_sharded(model: nn.Module) -> bool:
    """Return whether each rank holds a part of the model's weights (FSDP)."""
    return any(
        hasattr(parameter, "full_tensor") or hasattr(parameter, "_is_flat_param")
        for parameter in model.parameters()
    )
