"""Forward pass of experts, one by one, with their temporary layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from ipa_hf.expert_linear import ExpertLinear
from ipa_hf.expert_routing import RowRouting

MODULE_LAYERS: WeakKeyDictionary[nn.Module, ModuleLayers] = WeakKeyDictionary()


@dataclass(frozen=True)
class ModuleLayers:
    """Layers of an experts module by leaf names: ``gate_up_proj[3]``, ``down_proj[:]``."""

    layers: dict[str, ExpertLinear]
    routing_weights: bool


def forward_expert_by_expert(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute the experts in a loop, with their layers.

    Other experts that share a configuration with these have no layers.
    """
    call = _ExpertsCall(
        self, MODULE_LAYERS.get(self, ModuleLayers({}, False)), top_k_index, top_k_weights
    )
    first = "gate_up_proj" if self.has_gate else "up_proj"
    matrices = {leaf: getattr(self, leaf) for leaf in (first, "down_proj")}
    call.show_tokens(first, hidden_states)
    products = []
    for expert, rows in call.reached():
        hidden = hidden_states.index_select(0, call.token[rows])
        hidden = call.multiply(first, matrices[first][expert], expert, rows, hidden)
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        call.show_rows("down_proj", rows, hidden)
        hidden = call.multiply("down_proj", matrices["down_proj"][expert], expert, rows, hidden)
        if self.has_post_expert_norm:
            hidden = self.post_expert_norm(hidden)
        products.append(hidden * call.weight[rows, None])
    if not products:
        return torch.zeros_like(hidden_states)
    # One sum over the experts of a token is more exact in half precision than a running sum.
    routed = torch.cat(products)
    output = routed.new_zeros(top_k_index.numel(), routed.shape[-1])
    output[call.order[: len(routed)]] = routed
    return output.view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)


class _ExpertsCall:
    """Rows of a forward pass of an experts module, sorted by expert."""

    def __init__(
        self, experts: Any, added: ModuleLayers, index: torch.Tensor, weights: torch.Tensor
    ) -> None:
        self._experts, self._layers = experts, added.layers
        self._routing_weights = added.routing_weights
        chosen, choices = index.reshape(-1), index.shape[-1]
        self.tokens = index.shape[0]
        self.order = chosen.argsort(stable=True)
        self.token = self.order // choices
        self.weight = weights.reshape(-1)[self.order]
        # Under expert parallelism, indices from num_experts on mean experts of other devices.
        local = index < experts.num_experts
        self._by_token = (weights * local if added.routing_weights else local).sum(dim=-1)
        self._row_ends = torch.bincount(chosen, minlength=experts.num_experts).cumsum(0)

    def reached(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has rows, with the slice of its rows."""
        begin = 0
        for expert, end in enumerate(self._row_ends[: self._experts.num_experts].tolist()):
            if end > begin:
                yield expert, slice(begin, end)
            begin = end

    def show_tokens(self, leaf: str, tokens: torch.Tensor) -> None:
        """Call the layer shared by all experts, if it exists, with the tokens."""
        routing = RowRouting(self.tokens, None, self._by_token.float())
        self._call_layer(f"{leaf}[:]", routing, tokens, None, None)

    def show_rows(self, leaf: str, rows: slice, activation: torch.Tensor) -> None:
        """Call the layer shared by all experts, if it exists, with rows."""
        self._call_layer(f"{leaf}[:]", self._route(rows), activation, None, None)

    def multiply(
        self, leaf: str, matrix: torch.Tensor, expert: int, rows: slice, activation: torch.Tensor
    ) -> torch.Tensor:
        """Return products of rows with an expert's matrix, by its layer if it has one."""
        if self._experts.is_transposed:
            matrix = matrix.T
        bias = getattr(self._experts, f"{leaf}_bias")[expert] if self._experts.has_bias else None
        activation = activation.to(matrix.dtype)
        name = f"{leaf}[{expert}]"
        if name not in self._layers:
            return F.linear(activation, matrix, bias)
        product: torch.Tensor = self._call_layer(name, self._route(rows), activation, matrix, bias)
        return product

    def _route(self, rows: slice) -> RowRouting:
        weight = self.weight[rows] if self._routing_weights else None
        return RowRouting(self.tokens, self.token[rows], weight)

    def _call_layer(self, name: str, routing: RowRouting, *arguments: torch.Tensor | None) -> Any:
        if (layer := self._layers.get(name)) is not None:
            layer.routing = routing
            return layer(*arguments)
        return None
