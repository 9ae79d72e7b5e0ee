"""Nystrom sketch of a segment of the stream over one fixed basis."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Self

from ipa_core import _array
from ipa_core._array import Array, Namespace
from ipa_core._linalg import nystrom_rows, orthonormal_columns, reorthonormalize
from ipa_core.learners._row_blocks import Product, Rows

# Rows that are decomposed, that a basis is chosen on, or that are tested for novelty, at a time.
BLOCK = 128
# Blocks of the energy of the largest block that an image has room for.
_ROOM = 2.0**12


@dataclass(frozen=True)
class Segment:
    r"""Rows X of a segment, as the image of a basis O under their second moment.

    .. math:: Y \leftarrow Y + X^\top W X O

    Parameters
    ----------
    basis : array of shape (features, k)
        O / unit.
    image : array of shape (k, features)
        Y^T / unit.
    unit : float
        Power of two by which lengths are divided, so that products stay in the range of the dtype.
    rows : int
        Number of rows.
    energy : float
        Weighted sum of the squared lengths of the rows.
    is_half : bool
        Whether products are taken in half precision. The basis then holds rounded numbers: the
        image is of the very basis that was used, and rounding of rows averages out.
    """

    basis: Array
    image: Array
    unit: float
    rows: int = 0
    energy: float = 0.0
    is_half: bool = False

    @classmethod
    def begin(cls, xp: Namespace, rows: Array, unit: float, is_half: bool) -> Segment:
        """Begin a segment with the span of the rows (k, d) as its basis."""
        basis = reorthonormalize(xp, rows.T) / unit
        if is_half:
            half = _array.half_dtype(xp, _array.device(basis))
            basis = _array.cast(xp, _array.cast(xp, basis, half), basis.dtype)
        # In the order of basis.T, which zeros_like keeps, torch adds products of rows slowly.
        features, width = basis.shape
        image = xp.zeros((width, features), dtype=basis.dtype, device=_array.device(basis))
        return cls(basis, image, unit, is_half=is_half)

    def multiply(self, xp: Namespace, x: Array) -> Product:
        """Return X O / unit.

        In half precision whole blocks only: libraries prepare a product of every new number of
        rows for longer than it takes.
        """
        if not self.is_half or x.shape[0] % BLOCK:
            x = _array.cast(xp, x, self.basis.dtype)
            return Product(x, x @ self.basis)
        dtype = _array.half_dtype(xp, _array.device(x))
        half = _array.cast(xp, x, dtype)
        return Product(half, _array.half_matmul(half, _array.cast(xp, self.basis, dtype)))

    def largest_energy(self, xp: Namespace) -> float:
        """Return the energy of the largest block that the image has room for."""
        return float(xp.finfo(self.basis.dtype).max) / _ROOM * self.unit

    def add(self, xp: Namespace, parts: list[tuple[Rows, Product]]) -> Self:
        """Add rows X, each part with its X O."""
        image, count, energy = self.image, self.rows, self.energy
        for rows, product in parts:
            weighted = _array.cast(xp, rows.apply_weights(product.seen), product.x.dtype)
            is_half = product.x.dtype != image.dtype
            matmul = _array.half_matmul if is_half else operator.matmul
            image = image + matmul(weighted.T, product.x)
            count, energy = count + rows.count, energy + rows.energy()
        return replace(self, image=image, rows=count, energy=energy)

    def to_factor(self, xp: Namespace) -> Array:
        """Return F (k, features) with F^T F the second moment of the rows, by Nystrom."""
        return nystrom_rows(xp, self.basis, self.image, self.energy / self.rows / self.unit**2)


def with_probes(
    xp: Namespace, known: Array, block: Rows, width: int, seed: tuple[int, int]
) -> Array:
    """Return known directions (m, d) and ``width`` - m probes of the rows to come, as rows.

    The known directions are orthonormal within rounding, or zero. The probes are randomly signed
    sums of what the rows of the block have outside of them, power-iterated once on it. The block
    may be sparse. Probes are rows: products with a few columns take up to five times as long.
    """

    def outside(rows: Array) -> Array:
        return rows - (rows @ known.T) @ known

    def sums(coefficients: Array) -> Array:
        weighted = coefficients if block.weights is None else coefficients * block.weights
        return outside(weighted / unit @ block.x)

    unit = block.unit()
    drawn = _array.random_signs((width - known.shape[0], block.count), *seed)
    signs = _array.from_numpy(xp, drawn, _array.device(known), known.dtype)
    tests = orthonormal_columns(xp, sums(signs).T).T
    response = sums(outside(tests) @ block.x.T / unit)
    return xp.concat([known, orthonormal_columns(xp, response.T).T])
