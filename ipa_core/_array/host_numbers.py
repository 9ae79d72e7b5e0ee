"""Operations on numbers on the host."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np

from ipa_core._array.dtypes import dtype_name
from ipa_core._array.types import DType, HostArray, HostMask


def ignore_overflow() -> AbstractContextManager[None]:
    """Return a context without NumPy's overflow warnings, for results that are checked later."""
    return np.errstate(over="ignore", invalid="ignore", under="ignore")


def rounded(values: HostArray, dtype: DType) -> HostArray:
    """Return host numbers rounded to a dtype of any library."""
    with ignore_overflow():
        return values.astype(dtype_name(dtype)).astype(np.float64)


def host_ones(count: int) -> HostArray:
    return np.ones(count)


def host_concat(parts: Sequence[HostArray]) -> HostArray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def group_sums(values: HostArray | HostMask, ends: list[int]) -> list[float]:
    """Return the sum of each group of values, given where the groups end."""
    sums: list[float] = np.add.reduceat(values, [0, *ends[:-1]], dtype=np.float64).tolist()
    return sums
