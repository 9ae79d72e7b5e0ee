"""Damped Cholesky factors of second moments, for solves with matrices that are nearly singular."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ipa_core import _array, settings
from ipa_core._array import Array, Namespace, cast, device, ignore_overflow, namespace
from ipa_core.errors import NonFiniteError, SettingError, ShapeError

_ESCALATION = 10.0


@dataclass(frozen=True, eq=False)
class DampedCholesky:
    r"""The Cholesky factor of a damped matrix, :math:`L L^\top = H + \lambda I`.

    Rows and columns of dead features, those whose diagonal entry is zero, are those of the identity
    in the factored matrix; solutions are zero there.

    Parameters
    ----------
    factor : array of shape (features, features)
        L, lower triangular.
    damping : float
        What was added to the diagonal in the end, as a share of its mean over live features.
    dead : array of bool, shape (features,)
        Features whose diagonal entry is zero.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import damped_cholesky
    >>> cholesky = damped_cholesky(np.diag([4.0, 1.0, 0.0]), damping=0.0)
    >>> cholesky.solve(np.array([4.0, 4.0, 4.0]))
    array([1., 4., 0.])
    >>> cholesky.dead
    array([False, False,  True])
    """

    factor: Array
    damping: float
    dead: Array

    def solve(self, right: Array) -> Array:
        """Return (H + lambda I)^-1 ``right``, for ``right`` of shape (features,) or (features, k).

        Zero in the rows of dead features.

        Raises
        ------
        ShapeError
            If the first axis is not ``features`` long.
        """
        _array.check_array(right)
        _array.check_home(self.factor, right, "pass an array like the factor")
        features = self.factor.shape[0]
        if right.ndim not in (1, 2) or right.shape[0] != features:
            raise ShapeError(
                f"expected an array of shape ({features},) or ({features}, k), "
                f"got {tuple(right.shape)}"
            )
        xp = namespace(self.factor, right)
        columns = right[:, None] if right.ndim == 1 else right
        half = xp.linalg.solve(self.factor, cast(xp, columns, self.factor.dtype))
        solution = xp.linalg.solve(self.factor.T, half)
        solution = solution * _live_features(xp, self.dead, solution)[:, None]
        return solution[:, 0] if right.ndim == 1 else solution

    def inverse(self) -> Array:
        """Return (H + lambda I)^-1, shape (features, features), zero for dead features."""
        xp = namespace(self.factor)
        half = xp.linalg.inv(self.factor)
        live = _live_features(xp, self.dead, half)
        return (half.T @ half) * live[:, None] * live


def damped_cholesky(
    matrix: Array, damping: float = 0.01, *, most_damping: float = 1.0
) -> DampedCholesky:
    r"""Factor a symmetric positive semi-definite matrix, damped as much as it takes.

    .. math:: L L^\top = H + \lambda \, \overline{\operatorname{diag}(H)} \, I

    with the mean over live features. Where the factorization fails, :math:`\lambda` grows tenfold
    (from 1e-8, if it was 0) up to ``most_damping``; `DampedCholesky.damping` reports it.

    Parameters
    ----------
    matrix : array of shape (features, features)
        H: a second moment, for example ``ExactCovariance.moment``.
    damping : float, default 0.01
        The first :math:`\lambda`, as GPTQ's ``percdamp``.
    most_damping : float, default 1.0
        The largest :math:`\lambda` to try.

    Raises
    ------
    ShapeError
        If the matrix is not square.
    NonFiniteError
        If it has values that are not finite.
    SettingError
        If the damping is negative or above ``most_damping``, or no damping up to that suffices.

    Notes
    -----
    Cost O(d^3) for each try. A feature is dead if its diagonal entry is 0.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import damped_cholesky
    >>> rows = np.ones((5, 3))  # rank one
    >>> cholesky = damped_cholesky(rows.T @ rows / 5)
    >>> cholesky.damping, cholesky.inverse().shape
    (0.01, (3, 3))
    """
    xp = _array.check_array(matrix)
    damping = settings.number("damping, between 0 and most_damping,", damping)
    most_damping = settings.number("most_damping, between 0 and infinity,", most_damping)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"expected a square matrix, got shape {tuple(matrix.shape)}")
    if not 0.0 <= damping <= most_damping < math.inf:
        raise SettingError(
            f"expected a damping between 0 and {most_damping}, got {damping!r}; it is a share of "
            "the mean of the diagonal"
        )
    if not bool(xp.all(xp.isfinite(matrix))):
        raise NonFiniteError("expected a matrix of finite values, got NaN or infinity")
    diagonal = xp.linalg.diagonal(matrix)
    dead = diagonal == 0
    live = _live_features(xp, dead, matrix)
    unit = float(xp.sum(diagonal)) / max(1.0, float(xp.sum(live)))
    identity = xp.eye(matrix.shape[0], dtype=matrix.dtype, device=device(matrix))
    masked = matrix * live[:, None] * live + identity * (1.0 - live)
    share = damping
    while share <= most_damping * (1 + 1e-12):
        factor = _cholesky(xp, masked + share * unit * live * identity)
        if factor is not None:
            return DampedCholesky(factor, share, dead)
        share = share * _ESCALATION if share else 1e-8
    raise SettingError(
        f"expected a matrix that a damping of at most {most_damping} makes positive definite, got "
        "one that is not; check that it is symmetric with no negative eigenvalues"
    )


def _live_features(xp: Namespace, dead: Array, like: Array) -> Array:
    """Return 1 for each feature that is not dead, else 0."""
    return cast(xp, ~dead, like.dtype)


def _cholesky(xp: Namespace, matrix: Array) -> Array | None:
    """Return the Cholesky factor, or None if the matrix is not positive definite."""
    try:
        with ignore_overflow():
            factor = xp.linalg.cholesky(matrix)
    except (ValueError, RuntimeError):  # LinAlgError, of NumPy and of torch
        return None
    return factor if bool(xp.all(xp.isfinite(factor))) else None
