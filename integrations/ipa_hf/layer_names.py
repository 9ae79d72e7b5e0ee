"""Names of layers, parameters and experts."""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.lora.layer import ParamWrapper


def layer_name(slot: str) -> str:
    """Return the layer or parameter of a slot.

    Examples
    --------
    >>> layer_name("model.layers.0.mlp.experts.gate_up_proj[3]")
    'model.layers.0.mlp.experts.gate_up_proj'
    """
    return slot.partition("[")[0]


def compact_names(slots: Iterable[str]) -> list[str]:
    """Return names of slots, with the experts of a parameter joined.

    Examples
    --------
    >>> compact_names(["q_proj", "experts.up_proj[0]", "experts.up_proj[7]"])
    ['q_proj', 'experts.up_proj[0, 7]']
    """
    experts: dict[str, list[str]] = {}
    for slot in slots:
        experts.setdefault(layer_name(slot), []).append(slot.partition("[")[2].rstrip("]"))
    return [f"{name}[{', '.join(which)}]" if which[0] else name for name, which in experts.items()]


def base_name(name: str) -> str:
    """Return the name of a module before PEFT wrapped it.

    Examples
    --------
    >>> base_name("model.layers.0.mlp.experts.base_layer.base_layer")
    'model.layers.0.mlp.experts'
    """
    return ".".join(part for part in name.split(".") if part != "base_layer")


def parameter_name(module_name: str, layer: ParamWrapper) -> str:
    """Return the name of a wrapped parameter in the base model.

    PEFT nests the wrappers of two parameters of a module, so their module names differ.
    """
    return f"{base_name(module_name)}.{layer.parameter_name}"
