"""Switch of attention modules that use the weight of a fused qkv without calling the layer.

EVA, BEiT and Swin V2 compute ``F.linear(x, self.qkv.weight, bias)`` if keys have no trainable bias.
The layer is not called, so its hooks do not run and an adapter has no effect. With
``qkv_bias_separate`` these modules call the layer and add the bias afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

_SWITCH = "qkv_bias_separate"


@contextmanager
def separate_qkv_bias(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Make attention call the layers of these names within the context."""
    switched = use_separate_qkv_bias(model, names)
    try:
        yield
    finally:
        restore_fused_qkv_bias(model, switched)


def use_separate_qkv_bias(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Set the switch in the parents of these qkv layers; return the names of changed modules."""
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
