"""Finding layers that are read past."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class WeightUseTracer(TorchFunctionMode):
    """Notes the layers whose weight any torch function is given, by whomever.

    A layer of which this is so, and whose forward never runs, is bypassed:
    ``F.linear(x, layer.weight)`` is invisible to hooks, and to adapters.
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
        """Look at the arguments, then do what was asked for."""
        # Reading an attribute such as weight.dtype is no use of the weight.
        if getattr(func, "__name__", "") != "__get__":
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, torch.Tensor) and id(value) in self._owners:
                    self.used.add(self._owners[id(value)])
        return func(*args, **(kwargs or {}))
