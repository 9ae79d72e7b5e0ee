"""Trainer callback for online learning of P."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ipa_core.settings import check_instance
from ipa_torch import OnlineLearning


class OnlineCallback(TrainerCallback):
    """Trainer callback that runs `ipa_torch.OnlineLearning.step` after each optimizer step.

    Only online learning needs it; a P that was fitted before training does not change. Attach the
    adapters with `ipa_torch.attach`. Under gradient accumulation P is learned from every
    micro-batch and updated once, after the optimizer step.

    Parameters
    ----------
    online : OnlineLearning
        Its context must enclose ``train()``. Use ``save_strategy="no"``: transformers refuses to
        save models whose layers share a tensor, here P. Save `ipa_torch.adapter_state_dict`.

    Attributes
    ----------
    lost_share : mapping of str to float
        Result of the last `OnlineLearning.step`.

    Raises
    ------
    SettingError
        If ``online`` is no `OnlineLearning`.
        During training, if the hooks saw no forward pass; see `OnlineLearning.step`.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import attach, fit_projectors
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 2))
    >>> attach(model, fit_projectors(model, [torch.randn(9, 8)], rank=2, progress=False))
    >>> with OnlineLearning(model) as online:
    ...     callback = OnlineCallback(online)  # Trainer(..., callbacks=[callback]).train()
    """

    def __init__(self, online: OnlineLearning) -> None:
        check_instance("online", online, OnlineLearning, "an OnlineLearning")
        self._online = online
        self.lost_share: Mapping[str, float] = {}

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Update P from the recorded activations; transform B and its first moment accordingly."""
        self.lost_share = self._online.step(kwargs["optimizer"])
