"""Compared methods: initialization of A, and trained parameters."""

from collections.abc import Callable, Mapping

import benchmarks.vision  # noqa: F401  isort: skip  (before timm)
import peft
from torch import nn

import ipa_timm
from ipa_core import Projector
from ipa_timm.classifier import classifier_parameters

RANK = 8

Projections = Mapping[str, Projector]


def head_only(model: nn.Module, projections: Projections) -> None:
    """Train the head beside the frozen model."""
    model.requires_grad_(False)
    for parameter in classifier_parameters(model).values():
        parameter.requires_grad_(True)


def lora(model: nn.Module, projections: Projections) -> None:
    """Train A and B, with A at random: PEFT's LoRA, at a scale of 1."""
    _inject(model, projections)


def dora(model: nn.Module, projections: Projections) -> None:
    """Train A, B and a magnitude for each output: PEFT's DoRA."""
    _inject(model, projections, use_dora=True)


def random_frozen(model: nn.Module, projections: Projections) -> None:
    """Train B only, beside LoRA's own random A."""
    _inject(model, projections)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)


def ipa_frozen(model: nn.Module, projections: Projections) -> None:
    """Train B only, beside the learned P."""
    ipa_timm.attach(model, projections)


def ipa_trainable(model: nn.Module, projections: Projections) -> None:
    """Train B and P, from the learned P."""
    ipa_timm.attach(model, projections, trainable=True)


METHODS: dict[str, Callable[[nn.Module, Projections], None]] = {
    "head only": head_only,
    "LoRA": lora,
    "DoRA-style": dora,
    "random A, frozen": random_frozen,
    "IPA, frozen": ipa_frozen,
    "IPA, trainable": ipa_trainable,
}


def _inject(model: nn.Module, projections: Projections, *, use_dora: bool = False) -> None:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(projections), use_dora=use_dora
    )
    peft.inject_adapter_in_model(config, model)
    for parameter in classifier_parameters(model).values():
        parameter.requires_grad_(True)
