"""Types of the array libraries, as far as they have any."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
HostArray: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
HostMask: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"
Namespace: TypeAlias = Any
Device: TypeAlias = Any
DType: TypeAlias = Any
