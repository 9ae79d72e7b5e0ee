"""The parts of a fitted model that are functions of its spectrum."""

from __future__ import annotations

import math
import sys
from typing import Any


def canonical(xp: Any, components: Any, energies: Any) -> Any:
    """Return the components, those without variance replaced by a function of the others.

    They are arbitrary otherwise, and rows that were not learned from have parts along them.
    """
    noise = components.shape[1] * sys.float_info.epsilon * float(xp.max(energies))
    kept = int(xp.count_nonzero(energies > noise))
    if kept == components.shape[0]:
        return components
    leading = components[:kept, :]
    basis = xp.linalg.qr(xp.concat([leading, xp.zeros_like(components[kept:, :])]).T).Q
    return xp.concat([leading, basis.T[kept:, :]])


def log_likelihood(xp: Any, x: Any, components: Any, variance: Any, noise: float) -> Any:
    """Return the log-density (n,) of centered rows x (n, d) under probabilistic PCA.

    The covariance is diag(variance) along the components (r, d) and ``noise`` along all other
    directions; its inverse is never formed. O(n d r).
    """
    rank, features = components.shape
    least = float(xp.finfo(x.dtype).eps) ** 2
    variance, noise = xp.clip(variance, min=least), max(noise, least)
    squares = (x @ components.T) ** 2
    distance = xp.sum(squares / variance, axis=1)
    log_volume = float(xp.sum(xp.log(variance))) + features * math.log(2 * math.pi)
    if rank < features:
        outside = xp.clip(xp.sum(x**2, axis=1) - xp.sum(squares, axis=1), min=0.0)
        distance = distance + outside / noise
        log_volume += (features - rank) * math.log(noise)
    return -0.5 * (distance + log_volume)
