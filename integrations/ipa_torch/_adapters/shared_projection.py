"""Projection s P x, computed once for all layers with the same input."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from ipa_torch._capture.autocast import autocast_dtype
from ipa_torch._layers.conv_view import ConvView
from ipa_torch._layers.linear_view import LinearView


class SharedProjection(nn.Module):
    """s P x for every row x of the input of the layers that share it.

    A frozen P is a buffer, which ``requires_grad_`` does not reach; a trained P is a parameter. The
    result is kept until the last layer that shares it has used it, or the input is freed.

    Parameters
    ----------
    weight : torch.Tensor of shape (rank, features)
        P.
    scale : float
        s.
    view : LinearView or ConvView
        View of the layers as a matrix product.
    trainable : bool

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import attach, fit_projectors
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    >>> attach(model, fit_projectors(model, [torch.randn(8, 16)], rank=2, progress=False))
    >>> projection = model[0].projection("default")
    >>> projection(torch.randn(5, 16)).shape, projection.trainable
    (torch.Size([5, 2]), False)
    """

    scale: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, scale: float, view: LinearView | ConvView, *, trainable: bool
    ) -> None:
        super().__init__()
        self.view = view
        if trainable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.tensor(scale, device=weight.device))
        self.users = 0
        self._recent: tuple[weakref.ref[torch.Tensor], tuple[Any, ...], torch.Tensor] | None = None
        self._uses = 0

    @property
    def trainable(self) -> bool:
        """True if P is a parameter."""
        return "weight" in self._parameters

    @property
    def rank(self) -> int:
        """Number of rows of P."""
        return int(self.weight.shape[0])

    def extra_repr(self) -> str:
        """Return the shape, and whether P is trained."""
        rank, features = self.weight.shape
        return f"{features} -> {rank}, {'trained' if self.trainable else 'frozen'}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return s P x, in the layout of the layer's output with ``rank`` in place of outputs."""
        # A compiler removes common subexpressions itself, and cannot trace weak references.
        if torch.compiler.is_compiling() or self.users < 2 or x.is_inference():
            return self._compute(x)
        return self._shared(x)

    def _shared(self, x: torch.Tensor) -> torch.Tensor:
        state = self._state(x)
        recent = self._recent  # another thread may replace it meanwhile
        if recent is not None:
            reference, recent_state, result = recent
            if reference() is x and recent_state == state:
                self._uses += 1
                if self._uses == self.users:
                    self._recent = None
                return result
        result = self._compute(x)
        self._uses = 1
        self._recent = (weakref.ref(x, self._forget), state, result)
        return result

    def _state(self, x: torch.Tensor) -> tuple[Any, ...]:
        """Return all that the result depends on but the identity of x.

        The number of the running backward pass keeps a checkpointed block, which runs again within
        it, from the results of its first run: autograd counts the saved tensors of both.
        """
        autocast = autocast_dtype(x.device)
        version = 0 if self.weight.is_inference() else self.weight._version
        graph = torch._C._current_graph_task_id()
        return x._version, version, self.weight.data_ptr(), torch.is_grad_enabled(), autocast, graph

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        if autocast_dtype(x.device) is None:
            x = x.to(self.weight.dtype)
        return self.view.project(x, self.weight) * self.scale

    def _forget(self, _: Any) -> None:
        self._recent = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_recent": None}
