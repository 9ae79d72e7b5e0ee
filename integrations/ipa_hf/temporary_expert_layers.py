"""Temporary layers for the matrices of fused experts, whose inputs hooks can observe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ipa_core.errors import SettingError
from ipa_hf.fused_parameters import ExpertSharing, fused_parameters
from ipa_torch.extension import LinearView, RowSelection, RowSubset, WeightedRows, view_of

#: Name of `_forward` in transformers' registry.
_IMPLEMENTATION = "ipa_expert_by_expert"


@dataclass(frozen=True)
class RowRouting:
    """Tokens and weights of the rows of an activation.

    Parameters
    ----------
    tokens : int
        Number of tokens, padding included.
    token : torch.Tensor or None
        Token index of each row, of shape (rows,); None if row i is token i.
    weight : torch.Tensor or None
        Factor of each row's weight, of shape (rows,), multiplied with its token's; None for ones.
    """

    tokens: int
    token: torch.Tensor | None
    weight: torch.Tensor | None

    def select(self, subset: RowSubset, device: torch.device) -> RowSubset:
        """Return the rows of a subset of the tokens, and their weights."""
        places, token_weight = subset.positions, subset.weights
        weight = self.weight
        if places is not None or token_weight is not None:
            by_token = torch.zeros(self.tokens, device=device)
            positive = 1.0 if token_weight is None else token_weight.to(by_token)
            by_token[slice(None) if places is None else places] = positive
            by_row = by_token if self.token is None else by_token[self.token]
            weight = by_row if weight is None else by_row * weight
        return RowSubset() if weight is None else RowSelection(weight).on(device)


class ExpertLinear(nn.Module):
    """Product with the matrix of an expert; its hooks observe the rows routed to the expert.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the matrix. The matrix is an argument of `forward`, as the experts hold it.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.routing: RowRouting | None = None

    def forward(
        self, rows: torch.Tensor, matrix: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return products (n, outputs) of rows (n, features), or the rows if no matrix is given."""
        return rows if matrix is None else F.linear(rows, matrix, bias)


@dataclass(frozen=True, kw_only=True)
class RoutedView(LinearView):
    """Rows along the last axis, weighted by the tokens that they were routed from."""

    layer: ExpertLinear

    def row_shape(self, activation: torch.Tensor) -> tuple[int, ...]:
        """Return the number of tokens, the shape of a mask."""
        return (self._routing.tokens,)

    def im2row(
        self, activation: torch.Tensor, subset: RowSubset, limit: int | None
    ) -> WeightedRows:
        """Return rows and weights, as for every `MatmulView`."""
        return super().im2row(activation, self._routing.select(subset, activation.device), limit)

    @property
    def _routing(self) -> RowRouting:
        assert self.layer.routing is not None  # _ExpertsCall sets it
        return self.layer.routing


@view_of.register(ExpertLinear)
def routed_view_of(layer: ExpertLinear) -> RoutedView:
    """Return the view of an expert's rows."""
    return RoutedView(layer=layer)


@dataclass(frozen=True)
class _ModuleLayers:
    """Layers of an experts module by leaf names: ``gate_up_proj[3]``, ``down_proj[:]``."""

    layers: dict[str, ExpertLinear]
    routing_weights: bool


_LAYERS: WeakKeyDictionary[nn.Module, _ModuleLayers] = WeakKeyDictionary()


@contextmanager
def expert_layers(
    model: nn.Module,
    targets: Iterable[str],
    *,
    sharing: ExpertSharing = "never",
    routing_weights: bool = False,
) -> Iterator[list[str]]:
    """Add a layer for each matrix of fused experts, within the context.

    The layers observe the inputs of the experts: `ipa_torch.fit_projectors`,
    `ipa_torch.learner_bytes` and `ipa_torch.store_activations` take their names as targets. The
    outputs of the model stay equal up to rounding.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model, with or without PEFT's wrappers. Restored on exit.
    targets : iterable of str
        Fused parameters, as in PEFT's ``target_parameters``: ``["mlp.experts.gate_up_proj"]``.
    sharing : {"never", "unreached", "always"}, default "never"
        ``"never"``: a layer for each expert, ``name[0]`` and so on. ``"always"``: a single layer
        ``name[:]`` for all experts. Its rows are the tokens, weighted by the number of their
        experts, or for ``down_proj`` the intermediate activations of all experts.
        ``"unreached"``: both.
    routing_weights : bool, default False
        Multiply the weights of rows by the router's weights.

    Yields
    ------
    list of str
        Names of the layers.

    Raises
    ------
    LayerError
        If nothing matches, or the inputs of a parameter cannot be observed; the message names it.
    SettingError
        If the experts have such layers already.

    Notes
    -----
    Within the context experts are computed in a loop, as by transformers' implementation
    ``"eager"``, which is slower than ``"grouped_mm"`` on accelerators.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import fit_projectors
    >>> from transformers import MixtralConfig, MixtralModel
    >>> size = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, vocab_size=16)
    >>> heads = dict(num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    >>> model = MixtralModel(MixtralConfig(**size, **heads))
    >>> batches = [torch.arange(16).reshape(2, 8)]
    >>> with expert_layers(model, ["experts.down_proj"]) as names:
    ...     projectors = fit_projectors(model, batches, 2, targets=names, progress=False)
    >>> list(projectors)
    ['layers.0.mlp.experts.down_proj[0]', 'layers.0.mlp.experts.down_proj[1]']
    """
    parameters = fused_parameters(model, targets).values()
    by_experts: dict[nn.Module, _ModuleLayers] = {}
    for fused in parameters:
        added = by_experts.setdefault(fused.experts, _ModuleLayers({}, routing_weights))
        for name in fused.layer_names(sharing):
            added.layers[name.rpartition(".")[2]] = ExpertLinear(*fused.sizes[1:])
    with ExitStack() as stack:
        for experts, added in by_experts.items():
            stack.enter_context(_use_layers(experts, added))
        for fused in parameters:
            # PEFT's outermost wrapper, if the experts are wrapped.
            parent = model.get_submodule(fused.name.rpartition(".")[0])
            for name in fused.layer_names(sharing):
                leaf = name.rpartition(".")[2]
                parent.add_module(leaf, by_experts[fused.experts].layers[leaf])
                stack.callback(parent._modules.pop, leaf)
        yield [name for fused in parameters for name in fused.layer_names(sharing)]


@contextmanager
def _use_layers(experts: Any, added: _ModuleLayers) -> Iterator[None]:
    """Make an experts module compute with its layers."""
    if experts in _LAYERS:
        raise SettingError(
            "expected experts without layers of expert_layers(), got a second context; leave the "
            "first one before"
        )
    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _forward)
    config = experts.config
    # The public attribute would set it in the sub-configurations too.
    previous = config._experts_implementation_internal
    _LAYERS[experts] = added
    config._experts_implementation_internal = _IMPLEMENTATION
    try:
        yield
    finally:
        config._experts_implementation_internal = previous
        del _LAYERS[experts]


def _forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute the experts in a loop, with their layers.

    Other experts that share a configuration with these have no layers.
    """
    call = _ExpertsCall(
        self, _LAYERS.get(self, _ModuleLayers({}, False)), top_k_index, top_k_weights
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
        self, experts: Any, added: _ModuleLayers, index: torch.Tensor, weights: torch.Tensor
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
