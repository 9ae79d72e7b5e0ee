"""LoRA layers whose adapters share one frozen A."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn

from ipa_core.errors import SettingError


class SharedLoraA(nn.Linear):
    """A of several adapters, which loading one of them may not change."""

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        loaded = state_dict.get(f"{prefix}weight")
        if loaded is not None and not torch.equal(loaded.to(self.weight), self.weight):
            raise SettingError(
                f"{prefix}weight: expected the A that several adapters share, got another one; "
                "load this adapter under a new name"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class SharedLoraLinear(Linear):
    r"""Linear layer with LoRA, faster than PEFT's in batches whose adapters share A.

    PEFT computes :math:`B_t A x` for the rows of each adapter t in turn. Here A x is computed once
    for all rows, then :math:`B_t` of each row in one product.
    """

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        tasks = [name for name in adapter_names if name in self.lora_A]
        if len({self.lora_A[name] for name in tasks}) != 1:
            mixed: torch.Tensor = super()._mixed_batch_forward(
                x, *args, adapter_names=adapter_names, **kwargs
            )
            return mixed
        kwargs.pop("alora_offsets", None)  # of a kind of adapters that cannot share A
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        a: Any = self.lora_A[tasks[0]]
        x = self._cast_input_dtype(x, a.weight.dtype)
        projected = a(x).reshape(len(x), -1, a.out_features)
        # Rows without an adapter get that of another row, times zero.
        scales = projected.new_tensor([self.scaling.get(name, 0.0) for name in adapter_names])
        rows = [name if name in self.lora_B else tasks[0] for name in adapter_names]
        weights = torch.stack([self.lora_B[name].get_parameter("weight") for name in rows])
        projected, weights = projected * scales[:, None, None], weights.transpose(1, 2)
        if projected.dtype == weights.dtype == result.dtype and result.is_contiguous():
            result.view(len(x), -1, weights.shape[2]).baddbmm_(projected, weights)
        else:  # under autocast, or over a base model in half precision
            result += torch.bmm(projected, weights).view_as(result).to(result.dtype)
        return result
