"""Whitening: a linear map to uncorrelated features of unit variance, and its inverse."""

from __future__ import annotations

from dataclasses import dataclass

from ipa_core import _array, settings
from ipa_core._array import Array, namespace
from ipa_core.errors import SettingError, ShapeError


@dataclass(frozen=True, eq=False)
class Whitening:
    r"""The map z = W (x - mean), and x = V z + mean back, as `Projector.whitening` returns it.

    Parameters
    ----------
    matrix : array of shape (outputs, features)
        W.
    inverse : array of shape (features, outputs)
        V: the pseudo-inverse of W.
    mean : array of shape (features,)
        Subtracted first; zeros for a projector about the origin.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import ExactCovariance
    >>> x = np.random.default_rng(0).standard_normal((1000, 2)) @ np.array([[3.0, 1.0], [0.0, 1.0]])
    >>> whitening = ExactCovariance(2, center=True).update(x).finalize().whitening()
    >>> abs(np.cov(whitening.whiten(x).T, bias=True)).round(3)
    array([[1., 0.],
           [0., 1.]])
    >>> bool(np.allclose(whitening.unwhiten(whitening.whiten(x)), x))
    True
    """

    matrix: Array
    inverse: Array
    mean: Array

    def whiten(self, x: Array) -> Array:
        """Return W (x - mean), shape (..., outputs), for x of shape (..., features).

        Raises
        ------
        ShapeError
            If the last axis of ``x`` is not ``features`` long.
        """
        x, matrix, mean = self._operands(x, self.matrix)
        return (x - mean) @ matrix.T

    def unwhiten(self, z: Array) -> Array:
        """Return V z + mean, shape (..., features), for z of shape (..., outputs).

        Raises
        ------
        ShapeError
            If the last axis of ``z`` is not ``outputs`` long.
        """
        z, inverse, mean = self._operands(z, self.inverse)
        return z @ inverse.T + mean

    def _operands(self, x: Array, matrix: Array) -> tuple[Array, Array, Array]:
        """Return x, a matrix that takes it, and the mean in their common dtype."""
        _array.check_array(x)
        xp = _array.check_home(matrix, x, "pass arrays like those of the projector")
        size = matrix.shape[1]
        if x.ndim < 1 or x.shape[-1] != size:
            raise ShapeError(f"expected an array of shape (..., {size}), got {tuple(x.shape)}")
        dtype = _array.wider_dtype(xp, x.dtype, matrix.dtype)
        x, matrix, mean = (_array.cast(xp, array, dtype) for array in (x, matrix, self.mean))
        return x, matrix, mean


def whitening_of(
    components: Array, energies: Array, mean: Array, eps: float, zca: bool
) -> Whitening:
    """Return the whitening of orthonormal components (r, d) with mean squares (r,).

    Raises
    ------
    SettingError
        If ``eps`` is negative, or a mean square plus ``eps`` is zero.
    """
    eps = settings.number("eps", eps)
    if eps < 0.0:
        raise SettingError(f"expected eps of at least 0, got {eps!r}")
    zca = settings.boolean("zca", zca)
    xp = namespace(components)
    squares = energies + eps
    if not float(xp.min(squares)) > 0.0:
        raise SettingError(
            "expected directions of positive energy, got some of energy 0; pass eps above 0 or "
            "truncate the projector to a smaller rank"
        )
    scales = xp.sqrt(squares)[:, None]
    matrix, inverse = components / scales, (components * scales).T
    if zca:
        matrix, inverse = components.T @ matrix, inverse @ components
    return Whitening(matrix, inverse, mean)
