"""Where learning stands between two batches: what is written down, and merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ipa_torch.sharing import Node

NEVER_RAN = "its forward never ran"
BYPASSED = "its weight is used without calling it, which no hook and no adapter can see"
NO_ROWS = "it saw no row of positive weight"


@dataclass(frozen=True)
class Standing:
    """What a listener knows.

    Parameters
    ----------
    at : mapping of str to Node
        For each layer the history it is at; layers that always saw the same inputs are at one.
    ran : mapping of str to torch.device
        Layers whose forward ran, and where.
    stopped, unfit : mapping of str to str
        Layers that learn no more because they have enough, or because of an input; and why.
    bypassed : frozenset of str
        Layers whose weight was used by another function than their forward.
    """

    at: Mapping[str, Node]
    ran: Mapping[str, torch.device]
    stopped: Mapping[str, str]
    unfit: Mapping[str, str]
    bypassed: frozenset[str]

    def missing(self, name: str) -> str | None:
        """Return why there is no projector for a layer, if there is none."""
        if name in self.unfit:
            return self.unfit[name]
        if name not in self.ran:
            return BYPASSED if name in self.bypassed else NEVER_RAN
        return None if self.at[name].learner.samples else NO_ROWS

    def groups(self) -> list[tuple[Node, list[str]]]:
        """Return each history with its layers, in the model's order."""
        nodes: dict[int, tuple[Node, list[str]]] = {}
        for name, node in self.at.items():
            nodes.setdefault(id(node), (node, []))[1].append(name)
        return list(nodes.values())
