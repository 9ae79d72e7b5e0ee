"""Learners of attention heads: a learner for each block of the last axis of an activation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, overload

import torch

from ipa_core import Learner
from ipa_core.errors import ArrayTypeError, SettingError, ShapeError
from ipa_core.learners._state import check_state_of
from ipa_core.settings import check_instance, check_iterable
from ipa_torch._capture.row_consumer import PendingRows
from ipa_torch._fit.early_stopping import StoppingCriteria


class HeadLearners(Sequence[Learner]):
    """The learners of the heads of a layer, in order; made by `fit_learners` with ``heads``.

    Parameters
    ----------
    learners : iterable of Learner
        New learners, in the order of the heads.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import fit_learners
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6))
    >>> learners = fit_learners(
    ...     model, [torch.randn(8, 4)], source="outputs", heads=3, progress=False
    ... )
    >>> len(learners["0"]), learners["0"][0].moment.shape
    (3, torch.Size([2, 2]))
    """

    def __init__(self, learners: Iterable[Learner]) -> None:
        check_iterable("learners", learners, "an iterable of learners")
        self._learners = tuple(learners)
        for learner in self._learners:
            check_instance("the learner of a head", learner, Learner, "a Learner")
        if not self._learners:
            raise SettingError("expected learners of at least one head, got none")
        self._count = len(self._learners)
        self.passes = max(learner.passes for learner in self._learners)

    @classmethod
    def repeat(cls, learner: Learner, count: int) -> Self:
        """Return new learners of ``count`` heads, equal to one.

        They are made with the first rows, which have at least as many features.
        """
        heads = cls([learner])
        heads._count = count
        return heads

    def _all(self) -> tuple[Learner, ...]:
        """Return the learners of all heads, after making them if need be."""
        if len(self._learners) < self._count:
            self._learners = tuple(copy.copy(self._learners[0]) for _ in range(self._count))
        return self._learners

    @overload
    def __getitem__(self, index: int) -> Learner: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Learner, ...]: ...
    def __getitem__(self, index: int | slice) -> Learner | tuple[Learner, ...]:
        return self._all()[index]

    def __len__(self) -> int:
        return self._count

    def __copy__(self) -> Self:
        twin = type(self)(map(copy.copy, self._learners))
        twin._count = self._count
        return twin

    def __repr__(self) -> str:
        return f"HeadLearners({self._count} of {self._learners[0]!r})"

    @property
    def samples(self) -> int:
        """Rows learned from, by each head."""
        return self._learners[0].samples

    @property
    def rank(self) -> int:
        """Rank of each learner."""
        return self._learners[0].rank

    def begin_update(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> PendingHeads:
        """Begin to learn from rows of all heads, as `Learner.begin_update`.

        Raises
        ------
        ShapeError
            If the heads do not divide the features.
        """
        check_instance("rows", rows, torch.Tensor, "a tensor", error=ArrayTypeError)
        if rows.layout != torch.strided:
            raise ArrayTypeError(f"expected dense rows, got {rows.layout}; pass rows.to_dense()")
        features = int(rows.shape[-1]) if rows.ndim else 0
        if not features or features % self._count:
            raise ShapeError(
                f"expected features that {self._count} heads divide, got {features}; give the "
                "number of heads of this activation, or leave the layer out of the targets"
            )
        blocks = rows.split(features // self._count, dim=-1)
        pending = [
            learner.begin_update(block, weights)
            for learner, block in zip(self._all(), blocks, strict=True)
        ]
        return PendingHeads(pending)

    def update(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> Self:
        """Learn from rows of all heads."""
        self.begin_update(rows, weights).finish()
        return self

    def compact(self) -> Self:
        """Return the same in its smallest form."""
        return type(self)(learner.compact() for learner in self._all())

    def merge(self, other: Self) -> Self:
        """Return new learners of the rows of both.

        Raises
        ------
        SettingError
            If the other has another number of heads, or other settings.
        """
        check_instance("the learners to merge with", other, HeadLearners, "HeadLearners")
        if len(other) != len(self):
            raise SettingError(f"expected {len(self)} heads to merge with, got {len(other)}")
        return type(self)(
            learner.merge(peer) for learner, peer in zip(self._all(), other, strict=True)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all heads, their keys after the number of the head."""
        states = [learner.state_dict() for learner in self._all()]
        flat = {
            f"{i}.{key}": value for i, state in enumerate(states) for key, value in state.items()
        }
        state = {"learner": type(self).__name__, "heads": len(self)} | flat
        return state | {key: states[0][key] for key in ("template",) if key in states[0]}

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Take over a state from `state_dict`, of as many heads with the same settings.

        Raises
        ------
        FileFormatError, SettingError
            If it is the state of another class, or of learners with other settings.
        """
        check_state_of(type(self), state)
        if state["heads"] != len(self):
            raise SettingError(f"expected the state of {len(self)} heads, got {state['heads']}")
        self._learners = tuple(
            copy.copy(learner).load_state_dict(_of_head(state, f"{head}."))
            for head, learner in enumerate(self._all())
        )
        return self


@dataclass(frozen=True)
class PendingHeads:
    """Updates of all heads."""

    heads: Sequence[PendingRows]

    def finish(self) -> None:
        """Complete the updates."""
        for head in self.heads:
            head.finish()


#: Learner of a layer, as `fit_learners` returns it.
LayerLearner: TypeAlias = Learner | HeadLearners


def _of_head(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def by_head(
    make_learner: Callable[[int], Learner], heads: int, stop: StoppingCriteria | None
) -> Callable[[int], HeadLearners]:
    """Return a factory of learners of all heads."""
    if (tolerance := StoppingCriteria.of(stop).tolerance) is not None:
        raise SettingError(
            "expected no tolerance with heads, whose excess error is not estimated, got "
            f"{tolerance!r}; use max_rows or max_batches"
        )
    return lambda rank: HeadLearners.repeat(make_learner(rank), heads)
