"""Float64 optimum, and two measures that compare projectors."""

import numpy as np
import scipy.linalg

from ipa_core._array import to_numpy


def host(array):
    """Return a float64 NumPy copy of an array of any library."""
    return np.asarray(to_numpy(array), dtype=np.float64)


def moment(x, weights=None, center=False):
    """Return the weighted mean of (x - mean) (x - mean)^T."""
    x = np.asarray(x, dtype=np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    if center:
        x = x - w @ x / w.sum()
    return (x * w[:, None]).T @ x / w.sum()


def residual(c, components):
    """Return the mean square that P misses, from the second moment."""
    p = host(components)
    return np.trace(c) - np.trace(p @ c @ p.T)


def optimum(c, rank):
    """Return the Eckart-Young residual of the second moment."""
    return np.clip(np.linalg.eigvalsh(c)[: len(c) - rank], 0, None).sum()


def excess(c, components):
    """Return residual / optimum - 1; only for spectra with a tail."""
    return residual(c, components) / optimum(c, components.shape[0]) - 1


def span(components):
    """Return a float64 basis of the rows of P: P is orthonormal to the digits of its dtype only.

    Beside a mean of length 2,000 the eighth digit of P is a thousandth of the residual.
    """
    return np.linalg.qr(host(components).T)[0].T


def angle(a, b):
    """Return the largest principal angle between two row spaces, in radians."""
    return scipy.linalg.subspace_angles(host(a).T, host(b).T).max()
