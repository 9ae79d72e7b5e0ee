"""Canonical components of a fitted model: a function of its spectrum alone."""

from __future__ import annotations

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
