"""Results of a fit by layer name: projectors or learners."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, TypeVar

import torch

import ipa_core
from ipa_core import Projector, allocate_ranks
from ipa_core.errors import FileFormatError
from ipa_core.settings import check_instance, integer
from ipa_core.text_table import align
from ipa_torch._layer_rank import resolve_rank

T = TypeVar("T")


class LayerMapping(Mapping[str, T]):
    """A read-only mapping from layer names to results, which layers with equal inputs share."""

    def __init__(
        self,
        learned: Mapping[str, T],
        *,
        missing: Mapping[str, str] | None = None,
        stopped: Mapping[str, str] | None = None,
        passes: int = 1,
    ) -> None:
        for name, value in (("missing", missing), ("stopped", stopped)):
            check_instance(name, value, (Mapping, NoneType), "a mapping or None")
            for reason in (value or {}).values():
                check_instance(f"each reason of {name}", reason, str, "a string")
        check_instance("learned", learned, Mapping, "a mapping from layer names")
        self._learned = dict(learned)
        self.missing: Mapping[str, str] = dict(missing or {})
        self.stopped: Mapping[str, str] = dict(stopped or {})
        self.passes = integer("passes", passes, least=1)

    def __getitem__(self, name: str) -> T:
        try:
            return self._learned[name]
        except KeyError:
            reason = self.missing.get(name, "it was not a target")
            raise KeyError(f"expected a layer with a result, got {name!r}: {reason}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._learned)

    def __len__(self) -> int:
        return len(self._learned)

    def __contains__(self, name: object) -> bool:
        return name in self._learned

    @property
    def shared(self) -> list[tuple[str, ...]]:
        """Names of the layers of each result."""
        groups: dict[int, list[str]] = {}
        for name, value in self._learned.items():
            groups.setdefault(id(value), []).append(name)
        return [tuple(names) for names in groups.values()]


M = TypeVar("M", bound=LayerMapping[Any])


class LayerLearners(LayerMapping[Any]):
    """A read-only mapping from layer names to learners, as `fit_learners` returns it.

    Layers with the same activations in all batches have the identical learner.

    Parameters
    ----------
    learned : mapping of str to Learner or HeadLearners
        In the model's order of layers.
    missing : mapping of str to str, optional
        Target layers without a learner, with the reason.
    stopped : mapping of str to str, optional
        Reason why the fit of each layer stopped.
    passes : int, default 1
        Number of memory passes over the batches, for a memory budget.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import fit_learners
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> learners = fit_learners(model, [torch.ones(8, 4)], progress=False)
    >>> learners
    LayerLearners(2 layers, 2 learners)
    >>> learners["0"].moment.shape
    torch.Size([4, 4])
    """

    def __repr__(self) -> str:
        missing = f", {len(self.missing)} layers missing" if self.missing else ""
        return f"LayerLearners({len(self)} layers, {len(self.shared)} learners{missing})"


class LayerProjectors(LayerMapping[Projector]):
    """A read-only mapping from layer names to projectors, as `fit_projectors` returns it.

    Layers with the same inputs in all batches have the identical `Projector`.

    Parameters
    ----------
    learned : mapping of str to Projector
        In the model's order of layers.
    missing : mapping of str to str, optional
        Target layers without a projector, with the reason.
    stopped : mapping of str to str, optional
        Reason why the fit of each layer stopped.
    passes : int, default 1
        Number of memory passes over the batches, for a memory budget.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import fit_projectors
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> projectors = fit_projectors(model, [torch.ones(8, 4)], rank=1, progress=False)
    >>> projectors
    LayerProjectors(2 layers, 2 projectors, rank 1, captured 1.000)
    >>> projectors["0"].features
    4
    """

    def __init__(self, learned: Mapping[str, Projector], **details: Any) -> None:
        check_projectors(learned)
        super().__init__(learned, **details)

    def __repr__(self) -> str:
        parts = [f"{len(self)} layers", f"{len(self.shared)} projectors"]
        if self._learned:
            ranks, captured = zip(*((p.rank, p.captured()) for p in self.values()), strict=True)
            parts += [f"rank {_span(ranks, 'd')}", f"captured {_span(captured, '.3f')}"]
        if self.missing:
            parts.append(f"{len(self.missing)} layers missing")
        return f"LayerProjectors({', '.join(parts)})"

    def table(self) -> str:
        """Return a table: rank, features, captured energy, samples, stop reason and layers.

        A stop reason that all layers have in common is below the table.
        """
        reasons = set(self.stopped.values())
        rows = [("rank", "features", "captured", "samples", "stopped", "layers")]
        for names in self.shared:
            p = self._learned[names[0]]
            numbers = (str(p.rank), str(p.features), f"{p.captured():.1%}", f"{p.samples:,}")
            rows.append((*numbers, self.stopped.get(names[0], "-"), shared_name(names)))
        for name, reason in self.missing.items():
            rows.append(("-", "-", "-", "-", "-", f"{name}: {reason}"))
        if len(reasons) != 1:
            return align(rows, left={4, 5})
        return "\n".join(
            [align([row[:4] + row[5:] for row in rows], left={4}), f"stopped: {reasons.pop()}"]
        )

    def truncate(self, rank: int | Mapping[str, int]) -> LayerProjectors:
        """Return projectors of a smaller rank, for all or by layer; sharing is kept. No cost.

        Raises
        ------
        RankError
            If a rank is larger than the projector's.
        LayerError
            If a mapping leaves out a layer.
        """
        truncated: dict[tuple[int, int], Projector] = {}
        smaller = {}
        for name, projector in self._learned.items():
            new_rank = resolve_rank(name, rank)
            key = (id(projector), new_rank)
            if key not in truncated:
                truncated[key] = projector.truncate(new_rank)
            smaller[name] = truncated[key]
        return LayerProjectors(
            smaller, missing=self.missing, stopped=self.stopped, passes=self.passes
        )

    def allocate(self, budget: int, *, floor: int = 1, cap: int | None = None) -> LayerProjectors:
        """Return projectors with ranks that capture the most energy in total, within a budget.

        Parameters
        ----------
        budget : int
            Sum of the ranks; a shared projector counts once.
        floor, cap : int, optional
            Smallest and largest rank of a layer; by default 1 and the rank of its projector.

        Raises
        ------
        RankError
            If the budget is below the sum of the floors or above the sum of the caps.

        Notes
        -----
        The energies of a layer are divided by their total; see `ipa_core.allocate_ranks`.
        """
        first = {names[0]: self._learned[names[0]] for names in self.shared}
        shares = {
            name: [float(energy) / (p.total_energy or 1.0) for energy in p.energies]
            for name, p in first.items()
        }
        ranks = allocate_ranks(shares, budget, floor=floor, cap=cap)
        return self.truncate({name: ranks[names[0]] for names in self.shared for name in names})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all projectors to a safetensors file, a shared projector once."""
        ipa_core.save(self._learned, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None
    ) -> LayerProjectors:
        """Read projectors from a file of `save`, as torch tensors.

        Raises
        ------
        FileFormatError
            If the file has other content, is damaged, or is of another format version.
        """
        loaded = ipa_core.load(path, library=torch, device=device)
        if not isinstance(loaded, dict):
            raise FileFormatError(
                f"{path}: expected projectors of named layers, got a single projector; "
                "read it with ipa_core.load"
            )
        return cls(loaded)


def check_projectors(projectors: Any, *, cure: str = "") -> None:
    """Check that a value maps layer names to projectors.

    Raises
    ------
    SettingError
        If it does not.
    """
    form = "a mapping from layer names to projectors"
    check_instance("projectors", projectors, Mapping, form, cure=cure)
    for name, projector in projectors.items():
        check_instance("the name of a layer", name, str, "a string", cure=cure)
        named = f"the projector of layer {name!r}"
        check_instance(named, projector, Projector, "a Projector", cure=cure)


def as_tensor(array: Any) -> torch.Tensor:
    """Return an array of a projector as a tensor, a tensor as it is: not on the default device."""
    return array if isinstance(array, torch.Tensor) else torch.as_tensor(array, device="cpu")


def _span(values: Sequence[float], form: str) -> str:
    """Return the smallest and the largest value, or the common value."""
    least, largest = format(min(values), form), format(max(values), form)
    return least if least == largest else f"{least} to {largest}"


def shared_name(names: tuple[str, ...]) -> str:
    """Return names with their common prefix written once: ``a.{q, k}``.

    Examples
    --------
    >>> shared_name(("block.0.q", "block.0.k"))
    'block.0.{q, k}'
    """
    if len(names) == 1:
        return names[0]
    common = os.path.commonprefix(names)
    prefix = common[: common.rfind(".") + 1]
    return f"{prefix}{{{', '.join(name.removeprefix(prefix) for name in names)}}}"
