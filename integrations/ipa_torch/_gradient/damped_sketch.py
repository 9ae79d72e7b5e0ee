"""A gradient sketch in which directions count less where inputs are large anyway."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch

from ipa_core import Learner, RandomizedSVD
from ipa_core.errors import SettingError
from ipa_torch._gradient.sketch import GradientSketch

#: Leading directions of the inputs that are known one by one.
_DIRECTIONS = 32
_PREFIX = "inputs."


class DampedGradientSketch(GradientSketch):
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
    >>> unwrap_model, damped = GradientSketch(rank=1), DampedGradientSketch(rank=1)
    >>> unwrap_model.update(x, g), damped.update(x, g)
    (None, None)
    >>> [int(one.finalize().components.abs().argmax()) for one in (unwrap_model, damped)]
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
        super().__init__(rank, seed=seed)
        self.held = held
        self._make = learner
        self._inputs: Learner | None = None

    def update(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add rows x (n, groups, features) with gradients g (n, groups, outputs of a group)."""
        before = self._inputs or self._make(min(max(_DIRECTIONS, self.held), x.shape[-1]))
        inputs = copy.copy(before).update(x.flatten(0, 1), (g != 0).any(-1).flatten())
        super().update(x, g)
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
        merged = super().merge(other)
        if self._inputs is None or other._inputs is None:
            merged._inputs = self._inputs or other._inputs
        else:
            merged._inputs = self._inputs.merge(other._inputs)
        return merged

    def compact(self) -> Self:
        """Return the same in its smallest form."""
        small = copy.copy(self)
        small._inputs = None if self._inputs is None else self._inputs.compact()
        return small

    def state_dict(self) -> dict[str, Any]:
        """Return settings, counts and tensors, from which `load_state_dict` goes on."""
        inputs = {} if self._inputs is None else self._inputs.state_dict()
        named = {_PREFIX + name: value for name, value in inputs.items()}
        return super().state_dict() | {"held": self.held} | named

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Take over a state from `state_dict`."""
        inputs = {
            name.removeprefix(_PREFIX): value
            for name, value in state.items()
            if name.startswith(_PREFIX)
        }
        self._inputs = self._make(inputs["rank"]).load_state_dict(inputs) if inputs else None
        self.held = state["held"]
        return super().load_state_dict(state)

    def _directions(self, image: torch.Tensor) -> torch.Tensor:
        """Return the held directions of the inputs and, orthogonal to them, those of a step."""
        assert self._inputs is not None  # it has learned wherever there is an image
        known = self._inputs.finalize()
        rows, energies = known.components.double(), known.energies.double()
        mean = known.total_energy / known.features
        others = max(1, known.features - known.rank)
        rest = max(0.0, known.total_energy - float(energies.sum())) / others
        along = image @ rows.T
        step = (image - along @ rows) / (rest + mean) + (along / (energies + mean)) @ rows
        held = rows[: self.held]
        row_shape = super()._directions(step - (step @ held.T) @ held)
        # Where the step has few directions, what follows is any: it may lean on the held ones.
        columns: torch.Tensor = torch.linalg.qr(torch.cat([held, row_shape]).T).Q
        return columns.T[: self.rank]
