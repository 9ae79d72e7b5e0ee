"""Exact second moment of weighted rows, which keeps what lies far below its largest entry."""

from __future__ import annotations

from dataclasses import dataclass

from ipa_core._array import Array, Namespace, cast, device, wide_dtype
from ipa_core._linalg import gram, pad_rows, top_eigh


@dataclass(frozen=True)
class SecondMoment:
    r"""Sum of :math:`w x x^\top`: the matrix itself, or its triangular root.

    A product of two rows doubles the digits that it takes to tell a large direction from a small
    direction. Rows in float32 have their products in float64, where these digits are kept. Rows in
    the widest dtype of the device have no such room; their moment is kept as R with
    :math:`R^\top R = \sum w x x^\top`, which a QR decomposition updates without any product.

    Parameters
    ----------
    array : array of shape (features, features) or (rows, features)
        The moment, or its root.
    is_root : bool
        Whether ``array`` is R.
    """

    array: Array
    is_root: bool

    @classmethod
    def of(cls, xp: Namespace, rows: Array) -> SecondMoment:
        """Return the moment of rows (n, features), already multiplied by their root weights."""
        if wide_dtype(xp, device(rows)) == rows.dtype:
            return cls(_triangle(xp, rows), True)
        return cls(gram(xp, rows.T), False)

    def plus(self, xp: Namespace, other: SecondMoment) -> SecondMoment:
        """Return the sum of two moments of rows of one dtype.

        A root and a matrix meet where a state goes on at a device of another widest dtype.
        """
        if self.is_root and other.is_root:
            return SecondMoment(_triangle(xp, xp.concat([self.array, other.array])), True)
        first, second = (moment._as_matrix(xp) for moment in (self, other))
        return SecondMoment(first + second, False)

    def _as_matrix(self, xp: Namespace) -> Array:
        wide = cast(xp, self.array, wide_dtype(xp, device(self.array)))
        return gram(xp, wide.T) if self.is_root else wide

    def principal(self, xp: Namespace, rank: int) -> tuple[Array, Array]:
        """Return ``rank`` leading directions as orthonormal rows, and their energies."""
        if not self.is_root:
            values, vectors = top_eigh(xp, self.array, rank)
            return vectors.T, values
        padded = pad_rows(xp, self.array, rank)
        _, lengths, directions = xp.linalg.svd(padded, full_matrices=False)
        return directions[:rank, :], lengths[:rank] ** 2

    def residual(self, xp: Namespace, components: Array) -> float:
        """Return the sum of w |x - P^T P x|^2 for a matrix P (rank, features)."""
        p = cast(xp, components, self.array.dtype)
        if self.is_root:
            missed = self.array - (self.array @ p.T) @ p
            return float(xp.sum(missed**2))
        # tr (I - P^T P) C (I - P^T P): P is orthonormal to the rounding of its own dtype only.
        captured = p @ self.array @ p.T
        total = float(xp.linalg.trace(self.array)) - 2.0 * float(xp.linalg.trace(captured))
        return max(0.0, total + float(xp.linalg.trace((p @ p.T) @ captured)))

    def matrix(self) -> Array:
        """Return the moment (features, features)."""
        return self.array.T @ self.array if self.is_root else self.array


def _triangle(xp: Namespace, rows: Array) -> Array:
    """Return R (at most features rows) with R^T R = rows^T rows."""
    return xp.linalg.qr(rows, mode="reduced").R
