"""Detect layers whose weight is used without calling them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class WeightUseTracer(TorchFunctionMode):
    """Record of the layers whose weights are passed to any torch function.

    A layer in the record whose forward never runs is bypassed: hooks and adapters do not see
    ``F.linear(x, layer.weight)``.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._owners = {id(p): name for name, m in layers.items() for p in m.parameters()}
        self.used: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Record the layers of the arguments, then call the function."""
        # Access to an attribute such as weight.dtype does not use the weight.
        if getattr(func, "__name__", "") != "__get__":
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, torch.Tensor) and id(value) in self._owners:
                    self.used.add(self._owners[id(value)])
        return func(*args, **(kwargs or {}))
