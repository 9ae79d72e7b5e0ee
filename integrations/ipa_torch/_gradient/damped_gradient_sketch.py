"""Gradient sketch with damping by the second moment of the inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch

from ipa_core import Learner, RandomizedSVD
from ipa_core.errors import FileFormatError
from ipa_core.learners.factory import make_learner
from ipa_core.settings import check_callable, check_instance, number
from ipa_torch._float64 import in_float64
from ipa_torch._gradient.gradient_learner import check_rows_and_grads
from ipa_torch._gradient.gradient_sketch import GradientSketch

#: Leading directions along which the inputs' second moment is known.
_DIRECTIONS = 32
_PREFIX = "inputs."


class DampedGradientSketch(GradientSketch):
    r"""Leading row space of :math:`G (C + cI)^{-1}`, a step of damped least squares.

    G is the gradient of a layer's weight, C the second moment of its inputs, c the mean of C's
    eigenvalues: directions in which the inputs are large count less. C is known along its 32
    leading directions, by a learner, and taken as a multiple of the identity off them: no matrix of
    features x features is needed. Rows without a gradient, such as padding, do not count.

    A share of the rows of P may be leading directions of the inputs instead; the gradient's, made
    orthogonal to them, fill up the rank.

    Memory and time are those of a `GradientSketch` and of the learner.

    Parameters
    ----------
    rank : int
    learner : callable, default `ipa_core.RandomizedSVD`
        Makes a learner of the inputs from its rank.
    input_share : float, default 0
        The first ``round(input_share * rank)`` rows of P are leading directions of the inputs.
    seed : int, default 0
        Seed of the sketch.

    Raises
    ------
    SettingError
        If ``input_share`` is not between 0 and 1.

    Examples
    --------
    >>> import torch
    >>> sizes = torch.tensor([10.0, 1.0, 1.0, 1.0])
    >>> x = sizes * torch.randn(1000, 1, 4, generator=torch.Generator().manual_seed(0))
    >>> g = x[:, :, :1] + 60 * x[:, :, 1:2]  # the gradient is larger along the first direction
    >>> plain, damped = GradientSketch(rank=1), DampedGradientSketch(rank=1)
    >>> plain.update(x, g), damped.update(x, g)
    (None, None)
    >>> [int(sketch.finalize().components.abs().argmax()) for sketch in (plain, damped)]
    [0, 1]
    """

    _settings: ClassVar[tuple[str, ...]] = (*GradientSketch._settings, "input_share")

    def __init__(
        self,
        rank: int,
        learner: Callable[[int], Learner] = RandomizedSVD,
        *,
        input_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(rank, seed=seed)
        self.input_share = number(
            "input_share", input_share, form="from 0 to 1", valid=lambda share: 0 <= share <= 1
        )
        check_callable("learner", learner)
        self._make_learner = learner
        self._inputs: Learner | None = None

    @property
    def fixed_rows(self) -> int:
        """Rows of P that are leading directions of the inputs."""
        return round(self.input_share * self.rank)

    def update(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add rows x (n, groups, features) with gradients g (n, groups, outputs of a group)."""
        check_rows_and_grads(x, g)
        known = min(max(_DIRECTIONS, self.fixed_rows), x.shape[-1])
        before = self._inputs or make_learner(self._make_learner, known)
        inputs = copy.copy(before).update(x.flatten(0, 1), (g != 0).any(-1).flatten())
        super().update(x, g)
        self._inputs = inputs

    def merge(self, other: Self) -> Self:
        """Return the sketch of both parts.

        Raises
        ------
        SettingError
            If ranks, seeds, shares of inputs or learners differ.
        """
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
        """Return settings, counts and tensors, for `load_state_dict`."""
        inputs = {} if self._inputs is None else self._inputs.state_dict()
        named = {_PREFIX + name: value for name, value in inputs.items()}
        return super().state_dict() | {"input_share": self.input_share} | named

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Take over a state from `state_dict`."""
        check_instance("the state", state, Mapping, "a mapping", error=FileFormatError)
        share = number("input_share", state.get("input_share"), error=FileFormatError)
        inputs = {
            name.removeprefix(_PREFIX): value
            for name, value in state.items()
            if isinstance(name, str) and name.startswith(_PREFIX)
        }
        known = None
        if inputs:
            known = make_learner(self._make_learner, inputs.get("rank")).load_state_dict(inputs)
        super().load_state_dict(state)
        self._inputs, self.input_share = known, share
        return self

    def _directions(self, image: torch.Tensor) -> torch.Tensor:
        """Return the fixed rows and, orthogonal to them, the directions of a damped step."""
        assert self._inputs is not None  # it has samples wherever there is an image
        inputs = self._inputs.finalize()
        rows, energies = in_float64(inputs.components), in_float64(inputs.energies)
        mean = inputs.total_energy / inputs.features
        unknown = max(1, inputs.features - inputs.rank)
        remaining = max(0.0, inputs.total_energy - float(energies.sum())) / unknown
        along = image @ rows.T
        step = (image - along @ rows) / (remaining + mean) + (along / (energies + mean)) @ rows
        fixed = rows[: self.fixed_rows]
        directions = super()._directions(step - (step @ fixed.T) @ fixed)
        # Where the step has few directions, the others are arbitrary and may lean on the fixed.
        columns: torch.Tensor = torch.linalg.qr(torch.cat([fixed, directions]).T).Q
        return columns.T[: self.rank]
