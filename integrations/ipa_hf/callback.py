"""Online learning within transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ipa_torch import OnlineLearning


class OnlineCallback(TrainerCallback):
    """Calls `ipa_torch.OnlineLearning.step` after each step of the trainer's optimizer.

    For the online modes only, whose P goes on learning: a P that is learned before training needs
    no callback. The model's layers are adapted by `ipa_torch.attach`. Under gradient accumulation
    P is learned from every small batch, and changes once, after the optimizer.

    Parameters
    ----------
    online : OnlineLearning
        Entered around ``train()``, with ``save_strategy="no"``: transformers does not write models
        whose layers share a tensor, as these share P. Save `ipa_torch.adapter_state_dict`.

    Attributes
    ----------
    lost_share : mapping of str to float
        What `OnlineLearning.step` last returned.

    Raises
    ------
    SettingError
        In training, if the model ran without being seen; see `OnlineLearning.step`.

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
        self._online = online
        self.lost_share: Mapping[str, float] = {}

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Let P follow what was recorded, and carry B and its first moment along."""
        self.lost_share = self._online.step(kwargs["optimizer"])
