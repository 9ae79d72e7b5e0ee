"""Log-likelihood of rows under probabilistic PCA."""

from __future__ import annotations

import math
from typing import Any


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
