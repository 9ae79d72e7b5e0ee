"""Speed of the machine, and lower bounds of times that follow from it.

A figure's floor is the time of the operations and bytes that cannot be left out, at the speed of a
large matrix product and of a large copy, both measured in the same run.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch

from benchmarks.timing import interleaved
from ipa_core import Projector, RandomizedSVD


@dataclass(frozen=True)
class Machine:
    """Operations and bytes (read and written) a second, with the threads that torch has."""

    operations: float
    bytes: float

    def seconds(self, operations: float, moved: float = 0) -> float:
        """Return the least time of so many operations while so many bytes are moved."""
        return max(operations / self.operations, moved / self.bytes)

    def record(self) -> dict[str, float]:
        """Return both for a results file, in thousand millions."""
        return {f"giga_{name}_per_second": value / 1e9 for name, value in asdict(self).items()}

    @classmethod
    def from_record(cls, found: Mapping[str, float]) -> "Machine":
        """Return the machine that a results file tells of."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: found[f"giga_{name}_per_second"] * 1e9 for name in names})


def machine(
    device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 2048, copied: int = 2**28
) -> Machine:
    """Measure the best of several products of ``size`` and of several copies of so many bytes."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 7)
    return Machine(2 * size**3 / min(times["product"]), 2 * copied / min(times["copy"]))


def entries(projectors: Mapping[str, Projector]) -> int:
    """Return how many numbers the distinct inputs had that a model's projectors were learned from.

    Layers that share an input share the projector.
    """
    distinct = {id(projector): projector for projector in projectors.values()}
    return sum(projector.samples * projector.features for projector in distinct.values())


def two_products(rank: int, entries: int) -> int:
    """Return the operations of X O and X^T (X O) over so many entries of X."""
    return 4 * width(rank) * entries


def width(rank: int) -> int:
    """Return the columns of the default learner's sketch."""
    return rank + RandomizedSVD(rank).oversample
