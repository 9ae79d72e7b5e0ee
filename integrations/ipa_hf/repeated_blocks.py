"""Repeated blocks of a transformers model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ipa_torch.extension import is_linear


def block_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules within repeated blocks, with their names.

    In a model with a ``language_model`` beside other towers only those of the language model.
    """
    named = list(model.named_modules())
    blocks = [block for name, module in named for block in _blocks(name, module)]
    inside = tuple(f"{block}." for block in blocks)
    parts = [(name, x) for name, x in named if name in blocks or name.startswith(inside)]
    language = [(name, x) for name, x in parts if "language_model" in name.split(".")]
    yield from language or parts


def _blocks(name: str, container: nn.Module) -> list[str]:
    """Return the names of the entries of a container that are blocks, and no layers themselves."""
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        return []
    entries = {key: x for key, x in container.named_children() if [*x.children()]}
    kinds = [type(entry) for entry in entries.values()]
    if isinstance(container, nn.Sequential) and len(kinds) == len(set(kinds)):
        return []
    return [f"{name}.{key}".lstrip(".") for key, x in entries.items() if not is_linear(x)]
