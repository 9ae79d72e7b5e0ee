"""A gradient sketch in which directions count less where inputs are large anyway."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch

from ipa_core import Learner, Projector, RandomizedSVD
from ipa_core.errors import SettingError
from ipa_torch.sketch import GradientSketch

#: Leading directions of the inputs that are known one by one.
_DIRECTIONS = 32
_PREFIX = "inputs."


class DampedGradientSketch:
    r"""Leading row space of :math:`G (C + cI)^{-1}`, a step of damped least squares.

    G is the gradient of a layer's weight, C the second moment of its inputs, c the mean of C's
    eigenvalues. C is taken as known along its 32 leading directions, by a learner, and as a
    multiple of the identity off them: no matrix of features x features is needed. Rows without a
    gradient, as padding has none, do not count.

    The first ``held`` rows of P may be leading directions of the inputs instead; the gradient's,
    made orthogonal to them, fill up the rank.

    Memory and time are those of a `GradientSketch` and of the learner.

    Parameters
    ----------
    rank : int
    learner : callable, default RandomizedSVD
        Returns a learner of the inputs, given its rank.
    held : int, default 0
        Rows of P that are leading directions of the inputs.
    seed : int, default 0
        Of the sketch.

    Examples
    --------
    >>> import torch
    >>> sizes = torch.tensor([10.0, 1.0, 1.0, 1.0])
    >>> x = sizes * torch.randn(1000, 1, 4, generator=torch.Generator().manual_seed(0))
    >>> g = x[:, :, :1] + 60 * x[:, :, 1:2]  # the gradient is larger along the first direction
    >>> plain, damped = GradientSketch(rank=1), DampedGradientSketch(rank=1)
    >>> plain.update(x, g), damped.update(x, g)
    (None, None)
    >>> [int(one.finalize().components.abs().argmax()) for one in (plain, damped)]
    [0, 1]
    """

    def __init__(
        self,
        rank: int,
        learner: Callable[[int], Learner] = RandomizedSVD,
        *,
        held: int = 0,
        seed: int = 0,
    ) -> None:
        self.held = held
        self._sketch = GradientSketch(rank, seed=seed)
        self._make = learner
        self._inputs: Learner | None = None

    @property
    def rank(self) -> int:
        """Rows of P."""
        return self._sketch.rank

    @property
    def samples(self) -> int:
        """Rows seen."""
        return self._sketch.samples

    @property
    def learner(self) -> Self:
        """The sketch itself."""
        return self

    def update(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add rows x (n, groups, features) with gradients g (n, groups, outputs of a group)."""
        before = self._inputs or self._make(min(max(_DIRECTIONS, self.held), x.shape[-1]))
        alive = x[(g != 0).flatten(1).any(1)]
        inputs = copy.copy(before).update(alive.flatten(0, 1).float())
        self._sketch.update(x, g)
        self._inputs = inputs

    def merge(self, other: Self) -> Self:
        """Return the sketch of both parts.

        Raises
        ------
        SettingError
            If ranks, seeds, held rows or learners differ.
        """
        if self.held != other.held:
            raise SettingError(
                f"expected sketches of equal held rows, got {self.held} and {other.held}"
            )
        merged = copy.copy(self)
        merged._sketch = self._sketch.merge(other._sketch)
        if self._inputs is None or other._inputs is None:
            merged._inputs = self._inputs or other._inputs
        else:
            merged._inputs = self._inputs.merge(other._inputs)
        return merged

    def finalize(self) -> Projector:
        """Return the projector of what was seen.

        Raises
        ------
        EmptyStreamError
            If nothing was seen, or no gradient arrived.
        """
        image = self._sketch.image.double()
        assert self._inputs is not None
        known = self._inputs.finalize()
        rows, energies = known.components.double(), known.energies.double()
        mean = known.total_energy / known.features
        others = max(1, known.features - known.rank)
        rest = max(0.0, known.total_energy - float(energies.sum())) / others
        along = image @ rows.T
        solved = (image - along @ rows) / (rest + mean) + (along / (energies + mean)) @ rows
        return self._sketch.projector(solved, rows[: self.held])

    def summary(self) -> Self:
        """Return the same in its smallest form."""
        small = copy.copy(self)
        small._inputs = None if self._inputs is None else self._inputs.summary()
        return small

    def state_dict(self) -> dict[str, Any]:
        """Return settings, counts and tensors, from which `load_state_dict` goes on."""
        state = self._sketch.state_dict()
        inputs = {} if self._inputs is None else self._inputs.state_dict()
        return state | {_PREFIX + name: value for name, value in inputs.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Take over a state from `state_dict`."""
        inputs = {
            name.removeprefix(_PREFIX): value
            for name, value in state.items()
            if name.startswith(_PREFIX)
        }
        self._sketch = copy.copy(self._sketch).load_state_dict(state)
        self._inputs = self._make(inputs["rank"]).load_state_dict(inputs) if inputs else None
        return self
