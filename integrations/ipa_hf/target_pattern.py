"""Regular expression for the names of target layers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable


def target_pattern(names: Iterable[str], modules: Iterable[str]) -> str:
    """Return a regular expression that matches these names alone among those of the modules."""
    chosen, groups = set(names), defaultdict(list)
    for name in modules:
        groups[_any_block(name)].append(name)
    parts: list[str] = []
    for group, members in groups.items():
        matched = [name for name in members if name in chosen]
        parts += [group] if matched == members else map(re.escape, matched)
    return "|".join(parts)


def _any_block(name: str) -> str:
    r"""Return a pattern for a name with any numbers of blocks.

    Examples
    --------
    >>> print(_any_block("layers.3.mlp.fc1"))
    layers\.\d+\.mlp\.fc1
    """
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
