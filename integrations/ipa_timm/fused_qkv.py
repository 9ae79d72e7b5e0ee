"""Attention that adds the bias of its fused qkv itself.

EVA, BEiT and Swin V2 compute ``F.linear(x, self.qkv.weight, bias)`` where the keys have no bias of
their own to learn: past the layer, so that no hook hears of it and no adapter has an effect. Their
switch ``qkv_bias_separate`` makes them call the layer and add the bias afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

_SWITCH = "qkv_bias_separate"


@contextmanager
def separate_qkv_bias(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let attention call the layers of these names, and afterwards do as before."""
    switched = use_separate_qkv_bias(model, names)
    try:
        yield
    finally:
        restore_fused_qkv_bias(model, switched)


def use_separate_qkv_bias(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Switch the attention modules that hold layers of these names; return those that changed."""
    parents = dict.fromkeys(
        name.rpartition(".")[0] for name in names if name.rpartition(".")[2] == "qkv"
    )
    switched = [p for p in parents if getattr(model.get_submodule(p), _SWITCH, None) is False]
    for name in switched:
        setattr(model.get_submodule(name), _SWITCH, True)
    return switched


def restore_fused_qkv_bias(model: nn.Module, switched: Iterable[str]) -> None:
    """Undo `use_separate_qkv_bias`."""
    for name in switched:
        setattr(model.get_submodule(name), _SWITCH, False)
