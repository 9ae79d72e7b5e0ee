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
    switched = _fused_parents(model, names)
    try:
        _set_switch(model, switched, True)
        yield
    finally:
        try:
            restore_fused_qkv_bias(model, switched)
        except BaseException:  # an interruption
            restore_fused_qkv_bias(model, switched)
            raise


def use_separate_qkv_bias(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Set the switch in the parents of these qkv layers; return the names of changed modules."""
    switched = _fused_parents(model, names)
    _set_switch(model, switched, True)
    return switched


def restore_fused_qkv_bias(model: nn.Module, switched: Iterable[str]) -> None:
    """Undo `use_separate_qkv_bias`."""
    _set_switch(model, switched, False)


def _fused_parents(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the parents of these qkv layers in which the switch is not set."""
    parents = dict.fromkeys(
        name.rpartition(".")[0] for name in names if name.rpartition(".")[2] == "qkv"
    )
    return [p for p in parents if getattr(model.get_submodule(p), _SWITCH, None) is False]


def _set_switch(model: nn.Module, names: Iterable[str], value: bool) -> None:
    for name in names:
        setattr(model.get_submodule(name), _SWITCH, value)
