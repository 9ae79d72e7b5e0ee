"""Random-sign sketch of a weight's gradient."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch

from ipa_core import Projector
from ipa_core.errors import (
    EmptyStreamError,
    FileFormatError,
    NonFiniteError,
    RankError,
)
from ipa_core.learners._validation import check_mergeable
from ipa_core.settings import check_instance, integer
from ipa_core.settings import rank as checked_rank
from ipa_torch._float64 import in_float64
from ipa_torch._gradient.gradient_learner import check_rows_and_grads
from ipa_torch._layers.row_samples import strided_sample

#: Rows of each batch in the sample of the energies that P captures of the inputs.
_SAMPLED_ROWS = 128


class GradientSketch:
    r"""Leading row space of :math:`G = \sum_i g_i x_i^\top`, a layer's weight gradient.

    .. math:: Y = S^\top G, \qquad P = \text{leading right singular vectors of } Y

    with a fixed matrix S of random signs, (outputs, k), k = max(32, 2r + 8), the same on every
    rank. Y is linear in the data: sketches of two parts merge by addition.

    The energies of the projector are those of the inputs, on a sample of rows, as the scale of
    `attach` needs them; its rows are in the order of the gradient's singular values.

    Memory O(k (features + outputs)), time O(k (features + outputs)) for a row.

    Parameters
    ----------
    rank : int
    seed : int, default 0
        Seed of S.

    Examples
    --------
    >>> import torch
    >>> x, g = torch.randn(50, 1, 4), torch.randn(50, 1, 3)
    >>> whole, half, rest = (GradientSketch(rank=1) for _ in range(3))
    >>> whole.update(x, g), half.update(x[:20], g[:20]), rest.update(x[20:], g[20:])
    (None, None, None)
    >>> p, q = (sketch.finalize().components for sketch in (whole, half.merge(rest)))
    >>> bool((p - q).abs().max() < 1e-4)
    True
    """

    _settings: ClassVar[tuple[str, ...]] = ("rank", "seed")

    def __init__(self, rank: int, *, seed: int = 0) -> None:
        self.rank = checked_rank(rank)
        self.seed = integer("seed", seed, least=0)
        self.samples = 0
        self._image: torch.Tensor | None = None
        self._sampled_rows: list[torch.Tensor] = []

    def update(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add rows x (n, groups, features) with gradients g (n, groups, outputs of a group)."""
        check_rows_and_grads(x, g)
        if self.rank > x.shape[-1]:
            raise RankError(
                f"expected a rank of at most {x.shape[-1]}, the number of features, "
                f"got {self.rank}; ask for a smaller rank"
            )
        x, g = x.float(), g.float()
        signs = self._signs(g.shape[1] * g.shape[2]).to(x.device).unflatten(0, g.shape[1:])
        image = torch.zeros(signs.shape[-1], x.shape[-1], device=x.device)
        for group in range(g.shape[1]):
            image = image + (g[:, group] @ signs[group]).T @ x[:, group]
        if not bool(image.isfinite().all()):
            raise NonFiniteError("expected finite inputs and gradients, got NaN or infinity")
        if not bool(image.any()):
            return
        self._image = image if self._image is None else self._image + image
        with_gradient = x[(g != 0).flatten(1).any(1)]  # without padding
        self._sampled_rows.append(
            strided_sample(with_gradient, _SAMPLED_ROWS).flatten(0, 1).clone()
        )
        self.samples += x.shape[0] * x.shape[1]

    def merge(self, other: Self) -> Self:
        """Return the sketch of both parts.

        Raises
        ------
        SettingError
            If settings differ.
        """
        check_mergeable(self, other, self._settings)
        merged = copy.copy(self)
        images = [sketch._image for sketch in (self, other) if sketch._image is not None]
        merged._image = torch.stack(images).sum(0) if images else None
        merged._sampled_rows = self._sampled_rows + other._sampled_rows
        merged.samples = self.samples + other.samples
        return merged

    def finalize(self) -> Projector:
        """Return the projector of the rows so far.

        Raises
        ------
        EmptyStreamError
            If there are no rows, or all gradients are 0.
        """
        if self._image is None or not bool(self._image.any()):
            raise EmptyStreamError(
                "expected gradients, got none; let the loss depend on the layer, and train the "
                "head for a moment before"
            )
        components = self._directions(in_float64(self._image))
        rows = in_float64(torch.cat(self._sampled_rows))
        energies = (rows @ components.T).square().mean(0)
        device = self._image.device
        return Projector(
            components.float().to(device),
            torch.zeros(components.shape[1], device=device),
            energies.float().to(device),
            float(rows.square().sum(1).mean()),
            self.samples,
        )

    def compact(self) -> Self:
        """Return the sketch, which has no smaller form."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return settings, counts and tensors, for `load_state_dict`."""
        state: dict[str, Any] = {"rank": self.rank, "seed": self.seed, "samples": self.samples}
        if self._image is None:
            return state
        kept = torch.cat(self._sampled_rows)
        return state | {"image": self._image, "kept": kept, "template": self._image[:0]}

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Take over a state from `state_dict`.

        Raises
        ------
        FileFormatError
            If it is something else.
        """
        check_instance("the state", state, Mapping, "a mapping", error=FileFormatError)
        rank, seed, samples = (
            integer(name, state.get(name), least=0, error=FileFormatError)
            for name in ("rank", "seed", "samples")
        )
        arrays = {name: state[name] for name in ("image", "kept") if name in state}
        for name, array in arrays.items():
            check_instance(name, array, torch.Tensor, "a tensor", error=FileFormatError)
        self.rank, self.seed, self.samples = rank, seed, samples
        self._image = arrays.get("image")
        self._sampled_rows = [arrays["kept"]] if "kept" in arrays else []
        return self

    def _directions(self, image: torch.Tensor) -> torch.Tensor:
        """Return orthonormal rows (rank, features) for the image (k, features)."""
        rows: torch.Tensor = torch.linalg.svd(image, full_matrices=False).Vh
        return rows[: self.rank]

    def _signs(self, outputs: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        width = max(32, 2 * self.rank + 8)
        signs = torch.randint(0, 2, (outputs, width), generator=generator, device="cpu")
        return signs.float() * 2 - 1
