"""`Projector`: an immutable value, the result of learning."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from ipa_core._array import Array, Device, DType, as_namespace, convert, describe, namespace
from ipa_core.errors import RankError, ShapeError
from ipa_core.whitening_transform import Whitening, whitening_of


@dataclass(frozen=True, eq=False, repr=False)
class Projector:
    r"""Linear projection P learned from activations, to be used as A of a low-rank adapter.

    For rows x of d features it gives :math:`z = P (x - \mu)` and
    :math:`\hat x = P^\top z + \mu`, with :math:`\mu = 0` unless learned with ``center=True``.

    Parameters
    ----------
    components : array of shape (rank, features)
        P: orthonormal rows, by decreasing energy.
    mean : array of shape (features,)
        :math:`\mu`, zeros for a projector learned about the origin.
    energies : array of shape (rank,)
        Mean squared coordinate along each row, in squared units of x, as estimated by the learner.
    total_energy : float
        Mean squared length of :math:`x - \mu`.
    samples : int
        Rows learned from. Rows of weight zero do not count; a row counts once, however many passes
        were made over it.

    Notes
    -----
    Projectors are compared as subspaces (`principal_angles`), never entry by entry: rows of equal
    energy are determined up to a rotation. The arrays are shared, not copied: do not modify them.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import fit_projector
    >>> x = np.random.default_rng(0).standard_normal((500, 3)) @ np.diag([3.0, 2.0, 0.1])
    >>> projector = fit_projector(x, rank=2)
    >>> projector.project(x).shape
    (500, 2)
    >>> projector.captured() > 0.99
    True
    """

    components: Array
    mean: Array
    energies: Array
    total_energy: float
    samples: int

    @property
    def rank(self) -> int:
        """Number of rows of P."""
        return int(self.components.shape[0])

    @property
    def features(self) -> int:
        """Number of features of the rows x."""
        return int(self.components.shape[1])

    def project(self, x: Array) -> Array:
        """Return P (x - mean), shape (..., rank), for x of shape (..., features). O(n d r).

        Raises
        ------
        ShapeError
            If the last axis of ``x`` is not ``features`` long.
        """
        self._check(x)
        return (x - self.mean) @ self.components.T

    def reconstruct(self, z: Array) -> Array:
        """Return P^T z + mean, shape (..., features), for z of shape (..., rank). O(n d r).

        Raises
        ------
        ShapeError
            If the last axis of ``z`` is not ``rank`` long.
        """
        if z.ndim < 1 or z.shape[-1] != self.rank:
            raise ShapeError(f"expected an array of shape (..., {self.rank}), got {tuple(z.shape)}")
        return z @ self.components + self.mean

    def reconstruction_error(self, x: Array, weights: Array | None = None) -> float:
        """Return the mean of |x - reconstruct(project(x))|^2 over the rows of x.

        Parameters
        ----------
        x : array of shape (..., features)
            Held-out rows, in the library and on the device of ``components``.
        weights : array of shape x.shape[:-1], optional
            Row weights; the mean is weighted by them.

        Raises
        ------
        ShapeError
            If shapes do not fit.

        Examples
        --------
        >>> import numpy as np
        >>> from ipa_core import fit_projector
        >>> x = np.eye(4)
        >>> round(fit_projector(x, rank=1).reconstruction_error(x), 6)
        0.75
        """
        self._check(x)
        xp = namespace(x, self.components)
        residual = x - self.reconstruct(self.project(x))
        squares = xp.vecdot(residual, residual)
        if weights is None:
            return float(xp.mean(squares))
        if tuple(weights.shape) != tuple(squares.shape):
            raise ShapeError(
                f"expected weights of shape {tuple(squares.shape)}, got {tuple(weights.shape)}"
            )
        weights = xp.astype(weights, squares.dtype)
        return float(xp.sum(weights * squares) / xp.sum(weights))

    def captured(self, rank: int | None = None) -> float:
        """Return the share of the energy that the leading ``rank`` rows capture, between 0 and 1.

        All-zero data counts as fully captured.

        Raises
        ------
        RankError
            If ``rank`` is not between 1 and the projector's rank.
        """
        if self.total_energy == 0.0:
            return 1.0
        xp = namespace(self.energies)
        kept = xp.sum(self.energies[: self._checked(rank)], dtype=self.energies.dtype)
        return min(1.0, float(kept) / self.total_energy)

    def truncate(self, rank: int) -> Projector:
        """Return the projector of a smaller rank: the leading rows, without computation.

        Raises
        ------
        RankError
            If ``rank`` is not between 1 and the projector's rank.
        """
        kept = self._checked(rank)
        return Projector(
            self.components[:kept, :],
            self.mean,
            self.energies[:kept],
            self.total_energy,
            self.samples,
        )

    def whitening(self, eps: float = 0.0, *, zca: bool = False) -> Whitening:
        r"""Return the map to uncorrelated features of unit mean square, with its inverse.

        .. math:: W = (E + \epsilon I)^{-1/2} P, \qquad
                  W_\text{ZCA} = P^\top (E + \epsilon I)^{-1/2} P

        with E the energies. A projector learned with ``center=True`` whitens the covariance.

        Parameters
        ----------
        eps : float, default 0
            Added to the energies, in squared units of x.
        zca : bool, default False
            Rotate back, so that the outputs are as near to x as whitened features can be; below
            full rank they lie in the span of P.

        Raises
        ------
        SettingError
            If ``eps`` is negative, or 0 beside a direction of energy 0.

        Examples
        --------
        >>> import numpy as np
        >>> from ipa_core import fit_projector
        >>> fit_projector(np.diag([4.0, 2.0]), rank=2).whitening().whiten(np.array([4.0, 2.0]))
        array([1.41421356, 1.41421356])
        """
        return whitening_of(self.components, self.energies, self.mean, eps, zca)

    def to(
        self,
        library: ModuleType,
        *,
        device: Device | None = None,
        dtype: DType | None = None,
    ) -> Projector:
        """Return the same projector in another library, on another device or of another dtype.

        Parameters
        ----------
        library : module
            ``numpy``, ``torch``, ``cupy``, ``jax.numpy`` or another array-API namespace.
        device, dtype : optional
            Of that library; default: its default device, and the present dtype.

        Examples
        --------
        >>> import numpy as np, torch
        >>> from ipa_core import fit_projector
        >>> fit_projector(np.eye(3), rank=2).to(torch, dtype=torch.float32).components.dtype
        torch.float32
        """
        xp = as_namespace(library)
        components, mean, energies = (
            convert(array, xp, device, dtype)
            for array in (self.components, self.mean, self.energies)
        )
        return Projector(components, mean, energies, self.total_energy, self.samples)

    def __repr__(self) -> str:
        return (
            f"Projector(rank={self.rank}, features={self.features}, "
            f"captured={self.captured():.3f}, samples={self.samples}, "
            f"{describe(self.components)})"
        )

    def _check(self, x: Array) -> None:
        if x.ndim < 1 or x.shape[-1] != self.features:
            raise ShapeError(
                f"expected an array of shape (..., {self.features}), got {tuple(x.shape)}"
            )

    def _checked(self, rank: int | None) -> int:
        if rank is None:
            return self.rank
        if not 1 <= rank <= self.rank:
            raise RankError(
                f"expected a rank between 1 and {self.rank}, the projector's rank, got {rank}; "
                "learn a projector of a larger rank"
            )
        return rank
