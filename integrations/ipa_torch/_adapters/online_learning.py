"""Online learning of projections during the training of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from ipa_core import IncrementalPCA, Learner
from ipa_core.errors import FileFormatError, SettingError
from ipa_core.learners.factory import make_learner
from ipa_core.settings import check_instance
from ipa_torch._adapters.adapter_layer import AdapterLayer, adapter_layers
from ipa_torch._adapters.adapter_scale import Scaling, check_scaling, resolve_scale
from ipa_torch._adapters.atomic_change import write_tensors
from ipa_torch._adapters.basis_change import Writes, change_basis
from ipa_torch._adapters.pass_lock import changing
from ipa_torch._adapters.shared_projection import SharedProjection
from ipa_torch._capture.activation_rows import ActivationRows
from ipa_torch._capture.async_update import AsyncUpdate
from ipa_torch._capture.attention_mask import attention_mask
from ipa_torch._capture.hooks import Hook, HookSet
from ipa_torch._capture.row_weights import RowWeights
from ipa_torch._distributed.process_group import world
from ipa_torch._distributed.tree_reduce import merge_across_ranks
from ipa_torch._layers.activation_tensor import check_tensors, input_of
from ipa_torch.errors import named_layer

_OPTIMIZER = "pass an optimizer of torch, or None"


class OnlineLearning:
    r"""Updates of an adapter's frozen P from the inputs of its layers in training.

    The paper's online modes: ``online_ipca`` with `ipa_core.IncrementalPCA`, ``online_gha`` with
    `ipa_core.HebbianRule`. Forward passes in training mode with gradients enabled are recorded,
    once, also under gradient checkpointing. P changes in `step` only: call it after the step of the
    optimizer.

    The new P is first rotated within its span to be closest to the old P (Procrustes), and the
    basis of B is changed, so that the function changes as little as possible:

    .. math:: B \leftarrow \frac{s_{old}}{s_{new}} \, B \, P_{old} P_{new}^\top

    The part of B P_old outside the new span is lost; `step` returns its share. The optimizer's
    first moment of B is rotated likewise, times s_new / s_old, as gradients are.

    Parameters
    ----------
    model : torch.nn.Module
        With an adapter attached.
    learner : callable, default `ipa_core.IncrementalPCA`
        Makes a learner from a rank.
    adapter_name : str, default "default"
        The adapter; its P must be frozen.
    scaling : "energy" or float, default "energy"
        As for `attach`: "energy" follows the inputs, a number is constant.
    row_weights : callable or None
        As for `fit_projectors`; its argument is the keywords of the model's call, or the positional
        arguments.
    max_patches : int or None, default 8192
        As for `fit_projectors`.

    Raises
    ------
    SettingError
        If the model has no such adapter, or its P is trained.

    Notes
    -----
    Compiled code (`torch.compile`) runs no hooks that are registered afterwards; `step` raises if
    nothing was recorded. In distributed training `step` merges the learners of all ranks, so that P
    is the same on all.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import OnlineLearning, attach, fit_projectors
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> x = torch.randn(64, 8)
    >>> attach(model, fit_projectors(model, [x], rank=2, progress=False))
    >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    >>> with OnlineLearning(model) as online:
    ...     model(x).square().mean().backward()
    ...     optimizer.step()
    ...     lost_share = online.step(optimizer)
    >>> sorted(lost_share)
    ['0']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learner: Callable[[int], Learner] = IncrementalPCA,
        adapter_name: str = "default",
        scaling: Scaling = "energy",
        row_weights: RowWeights | None = attention_mask,
        max_patches: int | None = 8192,
    ) -> None:
        check_scaling(scaling)
        check_instance("adapter_name", adapter_name, str, "a string")
        self._model = model
        self._adapter = adapter_name
        self._scaling = scaling
        self._reader = ActivationRows(model, row_weights, max_patches)
        self._groups: dict[SharedProjection, dict[str, AdapterLayer]] = {}
        for name, layer in adapter_layers(model):
            if adapter_name in layer.lora_B:
                self._groups.setdefault(layer.projection(adapter_name), {})[name] = layer
        if not self._groups or any(projection.trainable for projection in self._groups):
            raise SettingError(
                f"expected an adapter {adapter_name!r} with a frozen P, got "
                f"{'a trained P' if self._groups else 'none'}; attach it with trainable=False"
            )
        self._learners = {p: make_learner(learner, p.rank) for p in self._groups}
        self._recorded: set[Hashable] = set()  # inputs of this batch
        self._forward: set[SharedProjection] = set()  # recorded outside of backward passes
        self._fresh = False  # whether anything was recorded since the last step
        self._pending: tuple[str, AsyncUpdate] | None = None
        start = Hook(None, model, self._start_batch, first=True)
        self._hooks = HookSet([start, *self._reader.hooks, *self._layer_hooks()])

    def __repr__(self) -> str:
        layers = sum(map(len, self._groups.values()))
        rows = max(learner.samples for learner in self._learners.values())
        return f"OnlineLearning({layers} layers, {len(self._groups)} projectors, {rows:,} rows)"

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()
        self._reader.end_batch()
        self._reader.close()

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, float]:
        """Update P from the learners, and change the basis of B.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer, optional
            The optimizer of B, whose first moments change basis with B.

        Returns
        -------
        dict of str to float
            For each layer the share of B P_old outside the new span, in Frobenius norm: 0 if the
            function does not change.

        Raises
        ------
        SettingError
            If nothing was recorded since the last step.
        """
        if optimizer is not None:
            state = getattr(optimizer, "state", None)
            check_instance("the optimizer's state", state, Mapping, "a mapping", cure=_OPTIMIZER)
        self._finish_pending()
        # In a process group no rank may raise: the others would wait for it.
        if not self._fresh and world() is None:
            raise SettingError(
                "expected a forward pass in training mode with gradients since the last step, got "
                "none that was seen; enter the context before it, and do not compile the model"
            )
        lost_share: dict[str, float] = {}
        learners = {next(iter(g)): self._learners[p] for p, g in self._groups.items()}
        projectors = merge_across_ranks(learners, world())
        writes: Writes = []
        with changing(self._model):
            for (projection, layers), projector in zip(
                self._groups.items(), projectors.values(), strict=True
            ):
                if projector is None or projector.samples < projection.rank:
                    lost_share |= dict.fromkeys(layers, 0.0)
                    continue
                lora_B = {name: layer.lora_B[self._adapter] for name, layer in layers.items()}
                scale = resolve_scale(projector, self._scaling)
                changed, lost = change_basis(projection, lora_B, projector, scale, optimizer)
                writes += changed
                lost_share |= lost
            write_tensors(writes)
        self._fresh = False
        self._forward.clear()
        return lost_share

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the learners' states by their first layer, to be saved with the optimizer's.

        P is in the model's state, and in `adapter_state_dict`. In distributed training each rank
        has its own learners.
        """
        return {
            next(iter(layers)): self._learners[projection].state_dict()
            for projection, layers in self._groups.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore the learners from a `state_dict` of the same adapters and learner.

        Raises
        ------
        SettingError
            If the state is of other layers, or of a learner with other settings.
        FileFormatError
            If it is of another kind of learner.
        """
        check_instance("state", state, Mapping, "a mapping", error=FileFormatError)
        first = {next(iter(layers)): projection for projection, layers in self._groups.items()}
        if state.keys() != first.keys():
            raise SettingError(f"expected the state of {[*first]}, got that of {[*state]}")
        for name, projection in first.items():
            with named_layer(name):
                self._learners[projection].load_state_dict(state[name])

    def _layer_hooks(self) -> Iterator[Hook]:
        for projection, layers in self._groups.items():
            for name, layer in layers.items():
                yield Hook(name, layer, partial(self._observe_input, name, projection))
                yield Hook(name, layer, self._finish_pending, after=True)

    def _start_batch(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._reader.end_batch()
        self._recorded.clear()  # the same tensor in another batch counts again
        self._reader.start(kwargs or (args[0] if len(args) == 1 else args))

    def _observe_input(
        self,
        name: str,
        projection: SharedProjection,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        assert isinstance(layer, AdapterLayer)
        self._finish_pending()
        if not (layer.training and torch.is_grad_enabled() and layer.active == self._adapter):
            return
        if not self._is_first_run(projection):
            return
        with named_layer(name):
            x = input_of(layer.base_layer, args, kwargs)
            check_tensors(layer.base_layer, x)
            key = projection, self._reader.key_of(x, projection.view)
            if key in self._recorded:
                return
            self._recorded.add(key)
            rows = self._reader.read(name, x, projection.view)
            update = AsyncUpdate.begin(self._learners[projection], rows)
            self._pending = name, update
        if not update.is_async:
            self._finish_pending()

    def _is_first_run(self, projection: SharedProjection) -> bool:
        """Return False for the recomputation of a recorded forward pass in a backward pass.

        Reentrant checkpointing runs first without gradients, which is not recorded; then the
        recomputation is.
        """
        if torch._C._current_graph_task_id() == -1:
            self._forward.add(projection)
            return True
        return projection not in self._forward

    def _finish_pending(self, *_: Any) -> None:
        """Finish the update that has begun, if there is one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with named_layer(pending[0]):
                pending[1].finish()
            self._fresh = True
