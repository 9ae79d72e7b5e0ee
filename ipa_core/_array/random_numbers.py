"""Random numbers that are equal for every library."""

from __future__ import annotations

from typing import Any

import numpy as np


def random_signs(shape: tuple[int, ...], seed: int, stream: int) -> Any:
    """Draw +1 / -1 on the host: equal numbers for every library and every worker."""
    generator = np.random.default_rng([seed, stream])
    return generator.choice(np.array([-1.0, 1.0]), size=shape)


def random_normal(shape: tuple[int, ...], seed: int, stream: int) -> Any:
    """Draw standard normal numbers on the host: equal numbers for every library."""
    return np.random.default_rng([seed, stream]).standard_normal(shape)
