"""Masks on the host, applied to arrays on a device."""

from __future__ import annotations

import numpy as np

from ipa_core._array.inspection import device
from ipa_core._array.transfer import from_numpy
from ipa_core._array.types import Array, HostArray, HostMask, Namespace


def zero_where(values: HostArray, mask: HostMask) -> HostArray:
    """Return values, and 0 where the mask is true."""
    return np.where(mask, 0.0, values)


def zero_rows(xp: Namespace, matrix: Array, mask: HostMask) -> Array:
    """Return a matrix with zeros in the rows where a mask on the host is true."""
    gone = from_numpy(xp, mask, device(matrix), xp.bool)
    return xp.where(gone[:, None], xp.zeros_like(matrix), matrix)
