"""Nystrom sketch of a segment of the stream over one fixed basis."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Self

from ipa_core import _array
from ipa_core._array import Array, HostArray, HostMask, Namespace
from ipa_core._linalg import nystrom_rows, orthonormal_columns, reorthonormalize
from ipa_core.learners._row_blocks import Product, RowChunks, Rows, Sketch

# Rows that are decomposed, that a basis is chosen on, or that are tested for novelty, at a time.
BLOCK = 128
# Blocks of the energy of the largest block that an image has room for.
_ROOM = 2.0**12
# Rounding error of the energy of a row's product in half precision, as a share of the row's energy.
_HALF_ROUNDING = 2.0**-8


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

    def multiply(self, xp: Namespace, parts: tuple[Array, ...]) -> tuple[Product, ...]:
        """Return X O / unit for pieces of rows X."""
        with _array.ignore_overflow():  # rows too large for this segment: see fitting_blocks
            return tuple(self._multiply_part(xp, part) for part in parts)

    def _multiply_part(self, xp: Namespace, x: Array) -> Product:
        """Multiply a piece of rows.

        In half precision whole blocks only: libraries prepare a product of every new number of
        rows for longer than it takes.
        """
        if not self.is_half or x.shape[0] % BLOCK:
            x = _array.cast(xp, x, self.basis.dtype)
            return Product(x, x @ self.basis)
        dtype = _array.half_dtype(xp, _array.device(x))
        half = _array.cast(xp, x, dtype)
        return Product(half, _array.half_matmul(half, _array.cast(xp, self.basis, dtype)))

    def sketch(self, xp: Namespace, chunks: RowChunks) -> Sketch:
        """Return the products X O / unit of rows X, and the squared lengths of their rows."""
        products = self.multiply(xp, tuple(part.x for part in chunks.parts))
        with _array.ignore_overflow():
            squares = _array.squared_norms_async(xp, [product.seen for product in products])()
        return Sketch(products, _array.host_concat(squares))

    def missed_energies(self, xp: Namespace, chunks: RowChunks, sketch: Sketch) -> HostArray:
        """Return the weighted energy that the basis misses in each row, 0 within rounding."""
        with _array.ignore_overflow():
            missed = chunks.squares - sketch.squares[: chunks.count] * self.unit**2
        eps = 100 * float(xp.finfo(self.basis.dtype).eps)
        rounding = _HALF_ROUNDING if self.is_half else eps
        missed = _array.zero_where(missed, missed <= rounding * chunks.squares)
        return missed * chunks.host_weights

    def fitting_blocks(
        self, xp: Namespace, energies: list[float], heavy_rows: list[float], room: int
    ) -> int:
        """Return how many blocks fit the range of the image and the room for heavy rows."""
        largest = float(xp.finfo(self.basis.dtype).max) / _ROOM * self.unit
        for count, (energy, heavy) in enumerate(zip(energies, heavy_rows, strict=True)):
            if energy > largest or room <= 0:
                return count
            room -= int(heavy)
        return len(energies)

    def add(self, xp: Namespace, chunks: RowChunks, sketch: Sketch, heavy: HostMask) -> Self:
        """Add rows X with their X O to the image, without heavy ones, which are kept elsewhere."""
        image, energy, masks = self.image, self.energy, chunks.split(heavy)
        for rows, product, mask in zip(chunks.parts, sketch.products, masks, strict=False):
            x, seen = product.x[: rows.count, :], product.seen[: rows.count, :]
            if mask.any():
                seen = _array.zero_rows(xp, seen, mask)
            weighted = _array.cast(xp, rows.apply_weights(seen), x.dtype)
            matmul = operator.matmul if x.dtype == image.dtype else _array.half_matmul
            image = image + matmul(weighted.T, x)
            energy = energy + rows.energy()
        return replace(self, image=image, rows=self.rows + chunks.count, energy=energy)

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
