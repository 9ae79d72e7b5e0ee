"""A model cut in two: the lower blocks, run once and their output kept, and the upper ones.

Where only the upper blocks are adapted, nothing below them ever changes. Keeping what enters them
makes a run several times cheaper and gives, to rounding, the numbers of the whole model.
"""

from typing import Any

import torch
from torch import nn

#: Largest difference between the cut model and the whole one, relative to the largest output.
TOLERANCE = 1e-4

Batch = dict[str, torch.Tensor]


class _Reached(Exception):
    """The lower part has ended; carries what enters the upper one."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Passing(nn.Module):
    """In the place of embeddings: hands on what is given in their place."""

    def forward(self, inputs_embeds: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        if inputs_embeds is None:
            raise TypeError("expected inputs_embeds, got none; an upper part has no embeddings")
        return inputs_embeds


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a transformer's blocks: its longest list of modules."""
    lists = [(name, part) for name, part in model.named_modules() if _is_list(part)]
    if not lists:
        raise ValueError(f"expected a transformer with a list of blocks, got {type(model)}")
    return max(lists, key=lambda pair: len(pair[1]))


@torch.no_grad()
def entering(model: nn.Module, batch: Batch, block: int) -> torch.Tensor:
    """Return what enters a block, shape (batch, positions, width); what is above does not run."""

    def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    handle = blocks_of(model)[1][block].register_forward_pre_hook(reached, with_kwargs=True)
    try:
        model(**batch)
    except _Reached as reached_block:
        return reached_block.hidden
    finally:
        handle.remove()
    raise ValueError(f"expected block {block} of {type(model).__name__} to run, it did not")


def cut(model: nn.Module, block: int, batch: Batch) -> nn.Module:
    """Take the lower blocks away, in place; the model then takes `inputs_embeds`.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers encoder or causal model, in evaluation mode.
    block : int
        The first block to keep.
    batch : dict of torch.Tensor
        One batch to check with that nothing else happens between embeddings and blocks.

    Raises
    ------
    ValueError
        If the cut model computes something else than the whole one did.
    """
    hidden, before = entering(model, batch, block), _output(model, batch)
    name, blocks = blocks_of(model)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, blocks[block:])
    model.config.num_hidden_layers -= block  # read at run time by decoders
    model.config.use_cache = False  # a cache would number blocks as before
    if isinstance(getattr(model, "embeddings", None), nn.Module):
        model.embeddings = _Passing()  # of an encoder: these would add positions once more
    inputs = {"inputs_embeds": hidden, "attention_mask": batch["attention_mask"]}
    there = batch["attention_mask"].bool()
    difference = (_output(model, inputs) - before)[there].abs().max() / before[there].abs().max()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"expected {type(model).__name__} to compute the same from block {block} on, got a "
            f"relative difference of {float(difference):.1e}; adapt all blocks instead"
        )
    return model


@torch.no_grad()
def _output(model: nn.Module, batch: Batch) -> torch.Tensor:
    output = model(**batch)
    return output.logits if "logits" in output else output.last_hidden_state


def _is_list(part: nn.Module) -> bool:
    return isinstance(part, nn.ModuleList) and len(part) > 0
