"""Keeping batch norms from learning statistics while only adapters are trained.

A batch norm in training mode normalises by the batch and moves its running statistics, which
belong to the frozen model: its checkpoint would not have them, nor could they be taken out again.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def freeze_batchnorm_stats(model: nn.Module) -> None:
    """Let every batch norm use its running statistics as they are, in training mode, too."""
    for module in _norms(model):
        if _use_running not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_use_running)


def unfreeze_batchnorm_stats(model: nn.Module) -> None:
    """Undo `freeze_batchnorm_stats`."""
    for module in _norms(model):
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _use_running:
                del module._forward_pre_hooks[key]
        module.training = model.training


def _norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "running_var" in module._buffers]


def _use_running(module: nn.Module, args: Any) -> None:
    module.training = False
