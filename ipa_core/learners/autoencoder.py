"""Linear reconstruction autoencoder, trained by preconditioned gradient steps."""

from __future__ import annotations

from typing import ClassVar

from ipa_core import _array, settings
from ipa_core._array import Array, Namespace
from ipa_core._linalg import inverse_root, top_eigh
from ipa_core.learners._row_blocks import Rows
from ipa_core.learners._stochastic import StochasticRule
from ipa_core.learners.guarantee import Guarantee


class ReconstructionAutoencoder(StochasticRule):
    r"""Encoder P and decoder Q = P^T, trained by gradient on the reconstruction error.

    The gradient of :math:`\|x - Q P x\|^2` at an encoder W of orthonormal rows is
    :math:`S W - Z^\top X / n` (up to the factor 2), with codes Z = X W^T and S = Z^T Z / n. It is
    preconditioned by a running mean A of S, so that the step does not depend on the scale of the
    data and convergence is equally fast in all directions:

    .. math:: A \leftarrow (1 - a) A + a S, \qquad
              W \leftarrow W + a A^{-1} (Z^\top X / n - S W), \qquad
              a_t = \min\left(1, \frac{3}{t + 2}\right),

    then W is orthonormalized and A transformed with it. W has r + 8 rows; P is its leading r
    directions according to A.

    Guarantee: statistical, on streams that do not drift. Time O(4 (r + 8) d) for a row and pass,
    memory O((r + 8) d).

    Parameters
    ----------
    rank, center, seed
        As for every `Learner`.
    epochs : int, default 1
        Passes over the stream; more passes are more accurate.

    Raises
    ------
    SettingError
        If ``epochs`` is not an integer of at least 1.

    References
    ----------
    Baldi and Hornik, "Neural networks and principal component analysis", Neural Networks 1989.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import ReconstructionAutoencoder
    >>> x = np.random.default_rng(0).standard_normal((20000, 12)) * ([3.0, 2.0] + [1.0] * 10)
    >>> abs(ReconstructionAutoencoder(rank=1).update(x).finalize().components[0, :3]).round(1)
    array([1., 0., 0.])
    """

    guarantee = Guarantee("statistical", 0.1)
    _settings: ClassVar[tuple[str, ...]] = (*StochasticRule._settings, "epochs")
    _arrays: ClassVar[tuple[str, ...]] = (*StochasticRule._arrays, "_covariance")
    _step_numerator: ClassVar[float] = 3.0

    def __init__(self, rank: int, *, epochs: int = 1, center: bool = False, seed: int = 0) -> None:
        super().__init__(rank, center=center, seed=seed)
        self.epochs = self.passes = settings.integer("epochs", epochs, least=1)
        self._covariance: Array = None  # A, of the codes

    @property
    def _width(self) -> int:
        return min(self.rank + 8, int(self._template.shape[1]))

    def _step(self, xp: Namespace, rows: Rows, weight: float, size: float) -> None:
        encoder = self._directions
        codes = rows.x @ (encoder.T / self._unit)
        weighted = rows.apply_weights(codes)
        scatter = self._wide(xp, weighted.T @ codes) / weight
        old = scatter if self._covariance is None else self._covariance
        covariance = (1.0 - size) * old + size * scatter
        target = weighted.T @ rows.x / (weight * self._unit)
        gradient = target - _array.cast(xp, scatter, encoder.dtype) @ encoder
        step = _array.cast(xp, _inverse(xp, covariance, encoder.dtype), encoder.dtype)
        self._orthonormalize(xp, encoder + size * (step @ gradient), covariance)

    def _orthonormalize(self, xp: Namespace, encoder: Array, covariance: Array) -> None:
        """Replace W = R^T Q^T by Q^T, and A = R^T A' R by A'."""
        basis, triangle = xp.linalg.qr(encoder.T, mode="reduced")
        inverse = xp.linalg.inv(self._wide(xp, triangle))
        self._directions = basis.T
        self._covariance = inverse.T @ covariance @ inverse

    def _to_factor(self, xp: Namespace) -> Array:
        values, vectors = top_eigh(xp, self._covariance, self._covariance.shape[0])
        root = _array.cast(xp, (vectors * xp.sqrt(values * self._weight)).T, self._template.dtype)
        return root @ self._directions * self._unit

    def _from_factor(self, xp: Namespace, factor: Array, weight: float) -> None:
        basis, triangle = xp.linalg.qr(factor.T, mode="reduced")
        wide = self._wide(xp, triangle)
        self._directions = basis.T
        self._covariance = (wide / self._unit) @ (wide / self._unit).T / weight

    def _wide(self, xp: Namespace, array: Array) -> Array:
        return _array.cast(xp, array, _array.wide_dtype(xp, _array.device(array)))


def _inverse(xp: Namespace, covariance: Array, dtype: object) -> Array:
    """Invert the covariance of the codes on the directions of energy above rounding."""
    values, vectors = top_eigh(xp, covariance, covariance.shape[0])
    noise = values[0] * (covariance.shape[0] * float(xp.finfo(dtype).eps))
    root = inverse_root(xp, values, noise)
    return (vectors * root**2) @ vectors.T
