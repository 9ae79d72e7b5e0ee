"""`Projector`: an immutable value, the result of learning."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from ipa_core import _array, _torch_modes, settings
from ipa_core._array import Array, Device, DType, namespace
from ipa_core._weight_validation import host_weights
from ipa_core.errors import ArrayTypeError, EmptyStreamError, SettingError, ShapeError
from ipa_core.whitening_transform import Whitening, whitening_of


def check_projector(value: object) -> Projector:
    """Return the value if it is a projector.

    Raises
    ------
    ArrayTypeError
        If it is anything else.
    """
    if not isinstance(value, Projector):
        raise ArrayTypeError(f"expected a Projector, got {type(value).__name__}")
    return value


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

    Raises
    ------
    ArrayTypeError, ShapeError, SettingError
        If an array is not real floating, or shapes or numbers do not fit together.

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

    def __post_init__(self) -> None:
        for array in (self.components, self.mean, self.energies):
            _array.check_array(array)
        for array in (self.mean, self.energies):
            _array.check_home(self.components, array, "pass all arrays of a projector in one place")
        if self.components.ndim != 2 or 0 in self.components.shape:
            raise ShapeError(
                f"expected components of shape (rank, features), got {tuple(self.components.shape)}"
            )
        for name, length in (("mean", self.features), ("energies", self.rank)):
            shape = tuple(getattr(self, name).shape)
            if shape != (length,):
                raise ShapeError(f"expected {name} of shape ({length},), got {shape}")
        if settings.number("total_energy", self.total_energy) < 0.0:
            raise SettingError(f"expected total_energy of at least 0, got {self.total_energy}")
        settings.integer("samples", self.samples, least=0)

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

        The dtype is the wider one of ``x`` and ``components``; torch's autocast has no effect.

        Raises
        ------
        ShapeError
            If the last axis of ``x`` is not ``features`` long.
        ArrayTypeError
            If ``x`` is not real floating, or of another library or device than ``components``.
        """
        x, components, mean = self._operands(x, self.features)
        with _torch_modes.no_autocast(x):
            return (x - mean) @ components.T

    def reconstruct(self, z: Array) -> Array:
        """Return P^T z + mean, shape (..., features), for z of shape (..., rank). O(n d r).

        Raises
        ------
        ShapeError
            If the last axis of ``z`` is not ``rank`` long.
        ArrayTypeError
            If ``z`` is not real floating, or of another library or device than ``components``.
        """
        z, components, mean = self._operands(z, self.rank)
        with _torch_modes.no_autocast(z):
            return z @ components + mean

    def reconstruction_error(self, x: Array, weights: Array | None = None) -> float:
        """Return the mean of |x - reconstruct(project(x))|^2 over the rows of x.

        Parameters
        ----------
        x : array of shape (..., features)
            Held-out rows, in the library and on the device of ``components``.
        weights : array of shape x.shape[:-1], optional
            Boolean or floating row weights, in any library; the mean is weighted by them.

        Raises
        ------
        ShapeError, ArrayTypeError, WeightError
            If ``x`` or the weights are not valid.
        EmptyStreamError
            If there is no row of positive weight.

        Examples
        --------
        >>> import numpy as np
        >>> from ipa_core import fit_projector
        >>> x = np.eye(4)
        >>> round(fit_projector(x, rank=1).reconstruction_error(x), 6)
        0.75
        """
        with _torch_modes.isolated(self.components):
            rows, *_ = self._operands(x, self.features)
            residual = rows - self.reconstruct(self.project(rows))
            squares = _array.on_host(namespace(rows).vecdot(residual, residual)).reshape(-1)
        if weights is None:
            held = _array.host_ones(squares.size)
        else:
            held = host_weights(weights, tuple(rows.shape[:-1]), rows.dtype)
        if not held.sum() > 0.0:
            raise EmptyStreamError(
                "expected at least one row of positive weight, got none; check that the mask keeps "
                "some rows"
            )
        return float((held * squares).sum() / held.sum())

    def captured(self, rank: int | None = None) -> float:
        """Return the share of the energy that the leading ``rank`` rows capture, between 0 and 1.

        All-zero data counts as fully captured.

        Raises
        ------
        RankError
            If ``rank`` is not between 1 and the projector's rank.
        """
        rank = self._checked(rank)
        if self.total_energy == 0.0:
            return 1.0
        xp = namespace(self.energies)
        energies = self.energies[:rank]
        return min(1.0, float(xp.sum(energies, dtype=energies.dtype)) / self.total_energy)

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
            Of that library; default: its default device, and the present dtype, or float32 where
            library or device do not have it (bfloat16 in NumPy, float64 on many accelerators).

        Raises
        ------
        SettingError
            If this is no array library, or it has no such device or dtype.

        Examples
        --------
        >>> import numpy as np, torch
        >>> from ipa_core import fit_projector
        >>> fit_projector(np.eye(3), rank=2).to(torch, dtype=torch.float32).components.dtype
        torch.float32
        """
        xp = _array.as_namespace(library)
        components, mean, energies = (
            _array.convert(array, xp, device, dtype)
            for array in (self.components, self.mean, self.energies)
        )
        return Projector(components, mean, energies, self.total_energy, self.samples)

    def __repr__(self) -> str:
        return (
            f"Projector(rank={self.rank}, features={self.features}, "
            f"captured={self.captured():.3f}, samples={self.samples}, "
            f"{_array.describe(self.components)})"
        )

    def _operands(self, x: Array, length: int) -> tuple[Array, Array, Array]:
        """Return x, P and the mean in their common dtype, after a check of x."""
        _array.check_array(x)
        cure = "move the projector with projector.to(library, device=...)"
        xp = _array.check_home(self.components, x, cure)
        if x.ndim < 1 or x.shape[-1] != length:
            raise ShapeError(f"expected an array of shape (..., {length}), got {tuple(x.shape)}")
        dtype = _array.wider_dtype(xp, x.dtype, self.components.dtype)
        x, components, mean = (
            _array.cast(xp, array, dtype) for array in (x, self.components, self.mean)
        )
        return x, components, mean

    def _checked(self, rank: int | None) -> int:
        if rank is None:
            return self.rank
        return settings.rank(rank, most=self.rank, cure="learn a projector of a larger rank")
