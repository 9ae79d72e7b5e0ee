"""Forward passes of a language model that compute the logits of the last token only."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from ipa_torch.extension import Hook, HookSet

# Keywords of a batch of text without labels.
_TEXT = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "use_cache"}


def last_logits_only(model: torch.nn.Module) -> AbstractContextManager[object]:
    """Multiply only the last token of each sequence by the head of a language model.

    The logits of all tokens are the largest tensor of a language model, and its head is up to a
    fifth of the operations of a small one. All tokens get the logits of the last one, as a view.
    Only models of transformers, none of which computes other layers from logits, heads without an
    adapter, and batches of nothing but text, for which no loss is computed. Passes of other threads
    have all logits.
    """
    head = _head(model)
    if head is None:
        return nullcontext()
    calls = _HeadCalls()
    return HookSet(
        [
            Hook(None, model, calls.before_model),
            Hook(None, head, calls.before_head),
            Hook(None, head, calls.after_head, after=True),
        ]
    )


class _HeadCalls:
    """Calls of hooks that cut the head's input to the last token, and repeat its logits."""

    def __init__(self) -> None:
        self._is_text = False
        self._shapes: list[torch.Size | None] = []

    def before_model(self, _: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._is_text = not args and kwargs.keys() <= _TEXT

    def before_head(self, _: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        tokens = args[0] if args and self._is_text else None
        # Another class of tensors, such as a DTensor, may hold a part of the tokens.
        if type(tokens) is not torch.Tensor or tokens.ndim < 2:
            self._shapes.append(None)
            return None
        self._shapes.append(tokens.shape[:-1])
        return (tokens[..., -1:, :],), kwargs

    def after_head(
        self, _: torch.nn.Module, args: Any, kwargs: dict[str, Any], logits: torch.Tensor
    ) -> Any:
        shape = self._shapes.pop()
        return None if shape is None else logits.expand(*shape, logits.shape[-1])


def _head(model: torch.nn.Module) -> torch.nn.Linear | None:
    """Return the head of a language model of transformers, if it is a plain linear layer."""
    if not isinstance(model, PreTrainedModel) or not type(model).__module__.startswith(
        "transformers."
    ):
        return None
    head = model.get_output_embeddings()
    return head if isinstance(head, torch.nn.Linear) else None
