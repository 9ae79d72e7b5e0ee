"""Freezing of batch norm statistics while adapters are trained.

A batch norm in training mode normalizes by the batch and updates its running statistics. Those
belong to the frozen base model: an adapter file does not contain them, and `detach` could not
restore them.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def freeze_batchnorm_stats(model: nn.Module) -> None:
    """Make every batch norm use its running statistics unchanged, also in training mode."""
    for module in _batch_norms(model):
        if _use_running_stats not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_use_running_stats)


def unfreeze_batchnorm_stats(model: nn.Module) -> None:
    """Undo `freeze_batchnorm_stats`."""
    for module in _batch_norms(model):
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _use_running_stats:
                del module._forward_pre_hooks[key]
        module.training = model.training


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "running_var" in module._buffers]


def _use_running_stats(module: nn.Module, args: Any) -> None:
    module.training = False
