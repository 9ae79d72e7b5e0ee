"""The small dense algebra that the learners share. Every function is pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ipa_core._array import Array, Namespace, cast, device, leading_eigh, row_energies, wide_dtype
from ipa_core._threads import on_one_thread

# Energy of a column of a sketch that is all rounding, in units of eps times that of a row.
_ROUNDING = 10.0
# Features of a matrix that are cast to float64, stacked or decomposed at a time.
_SLICE = 4096
# Entries of a matrix that are decomposed at a time, in as many rows as a slice at least.
_ENTRIES = 1 << 18


def gram(xp: Namespace, *pieces: Array) -> Array:
    """Return the Gram matrix (m, m) of stacked rows, in float64 where there is one.

    The products are taken in float64 as well: one outlying coordinate a thousand times the rest
    costs a float32 Gram matrix up to 1e-2 of the captured energy.
    """
    wide = wide_dtype(xp, device(pieces[0]))

    def product(part: slice) -> Array:  # lets go of the slice before the next one is cast
        rows = cast(xp, _stack(xp, pieces, part), wide)
        return rows @ rows.T

    return sum(map(product, _slices(pieces[0].shape[1], _SLICE)))


def _stack(xp: Namespace, pieces: Sequence[Array], part: slice) -> Array:
    """Return some columns of stacked rows."""
    return _join(xp, [piece[:, part] for piece in pieces])


def _join(xp: Namespace, parts: Sequence[Array], axis: int = 0) -> Array:
    """Return parts in one array; a single one as it is."""
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=axis)


def _wide_product(xp: Namespace, left: Array, right: Array) -> Array:
    """Return a product of matrices in float64 where there is one, without casting them whole."""
    wide = wide_dtype(xp, device(left))
    slices = _slices(left.shape[1], _SLICE)
    return sum(cast(xp, left[:, part], wide) @ cast(xp, right[part, :], wide) for part in slices)


def _slices(length: int, size: int) -> list[slice]:
    """Return slices of at most a size, which follow each other."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


top_eigh = on_one_thread(leading_eigh)


@on_one_thread
def truncate_rows(xp: Namespace, pieces: Sequence[Array], keep: int) -> Array:
    """Return F (at most ``keep`` rows) with F^T F the best approximation of rows^T rows.

    The rows come in pieces, of which no stacked copy is made where they are fewer than the
    features. If they are more than ``keep``, the rows of F are orthogonal, by decreasing length.
    Cost O(m^2 d + m^3) for m rows of d features, or O(m d^2 + d^3) where that is less.
    """
    count, features = sum(piece.shape[0] for piece in pieces), pieces[0].shape[1]
    dtype, is_wide = pieces[0].dtype, wide_dtype(xp, device(pieces[0])) == pieces[0].dtype
    if keep < count <= features and not is_wide:
        _, vectors = top_eigh(xp, gram(xp, *pieces), keep)
        rotation = cast(xp, vectors, dtype).T
        parts = [rotation @ _stack(xp, pieces, part) for part in _slices(features, _SLICE)]
        return _join(xp, parts, axis=1)
    rows = _stack(xp, pieces, slice(None))
    if count <= keep:
        return rows
    if is_wide:
        return _truncate_by_svd(xp, rows, keep)
    values, vectors = top_eigh(xp, gram(xp, rows.T), min(keep, features))
    return cast(xp, (vectors * xp.sqrt(values)).T, dtype)


def _truncate_by_svd(xp: Namespace, rows: Array, keep: int) -> Array:
    """Truncate rows without products of two rows: no wider dtype could hold their digits."""
    basis, triangle = xp.linalg.qr(rows.T, mode="reduced")
    _, lengths, directions = xp.linalg.svd(triangle.T, full_matrices=False)
    keep = min(keep, lengths.shape[0])
    return (lengths[:keep, None] * directions[:keep, :]) @ basis.T


def pad_rows(xp: Namespace, rows: Array, count: int) -> Array:
    """Return the rows, and as many rows of zeros as ``count`` needs."""
    missing = count - rows.shape[0]
    return xp.concat([rows, *[xp.zeros_like(rows[:1, :])] * missing]) if missing > 0 else rows


@on_one_thread
def orthonormal_columns(xp: Namespace, columns: Array) -> Array:
    """Return an orthonormal basis Q of the columns, in their order; zero columns are completed.

    Many rows are decomposed in slices, and the stack of their triangles then: a decomposition takes
    the memory of several copies.
    """
    slices = _slices(columns.shape[0], max(_SLICE, _ENTRIES // columns.shape[1]))
    parts = [xp.linalg.qr(columns[part, :], mode="reduced") for part in slices]
    if len(parts) == 1:
        return parts[0].Q
    top = xp.linalg.qr(xp.concat([part.R for part in parts]), mode="reduced").Q
    ends = accumulate(part.R.shape[0] for part in parts)
    shares = [top[end - part.R.shape[0] : end, :] for part, end in zip(parts, ends, strict=True)]
    return xp.concat([parts.pop(0).Q @ share for share in shares])  # frees each part


@on_one_thread
def reorthonormalize(xp: Namespace, columns: Array) -> Array:
    """Return orthonormal columns with the span of nearly orthonormal ones; of others by QR.

    A Newton-Schulz step squares the distance of Q^T Q from the identity with two products, which
    take a third of the time of a QR decomposition.
    """
    identity = xp.eye(columns.shape[1], dtype=columns.dtype, device=device(columns))
    deviation = columns.T @ columns - identity
    distance = float(xp.max(xp.sum(xp.abs(deviation), axis=0)))
    if distance**2 <= float(xp.finfo(columns.dtype).eps):
        # In this order NumPy adds in place.
        return columns @ (deviation / -2) + columns
    return orthonormal_columns(xp, columns)


@on_one_thread
def principal_rows(xp: Namespace, factor: Sequence[Array], rank: int) -> tuple[Array, Array]:
    """Return the leading ``rank`` directions of factor^T factor as orthogonal rows, and energies.

    The factor comes in pieces. A row's squared length is its energy; `fixed_basis` makes them
    orthonormal.
    """
    *leading, last = factor
    missing = rank + 1 - sum(piece.shape[0] for piece in factor)
    # One zero row beyond the rank has a short factor decomposed, too: its rows may be oblique.
    factor = [*leading, pad_rows(xp, last, last.shape[0] + missing)]
    rows = truncate_rows(xp, factor, rank)
    return rows, row_energies(xp, rows)


def unit_rows(xp: Namespace, rows: Array, energies: Array) -> Array:
    """Return rows of length 1, and zeros for those too short to be scaled."""
    shortest = float(xp.finfo(rows.dtype).smallest_normal)
    scale = cast(xp, inverse_root(xp, energies, shortest**2), rows.dtype)
    return rows * scale[:, None]


@on_one_thread
def fixed_basis(xp: Namespace, rows: Array) -> Array:
    """Return orthonormal rows spanning ``rows`` in order, the largest entry of each positive."""
    squares = row_energies(xp, rows)
    # What is noise beside the longest row must not steer the completion of the basis.
    noise = xp.max(squares) * float(xp.finfo(rows.dtype).eps) ** 2
    scale = inverse_root(xp, squares, noise)
    wide = wide_dtype(xp, device(rows))
    basis = orthonormal_columns(xp, (cast(xp, rows, wide) * scale[:, None]).T).T
    peak = xp.argmax(xp.abs(basis), axis=1)
    values = xp.take_along_axis(basis, peak[:, None], axis=1)
    return cast(xp, basis * (1.0 - 2.0 * cast(xp, values < 0, basis.dtype)), rows.dtype)


@on_one_thread
def nystrom_rows(xp: Namespace, basis: Array, image: Array, energy: float) -> Array:
    """Return F with F^T F = Y (O^T Y)^-1 Y^T for the basis O (d, k) and the image Y^T (k, d).

    O may be any multiple of an orthonormal basis, if Y = C O for a moment C: the multiple cancels.
    ``energy`` is the mean squared length of the rows of C, in the units of the core O^T Y.

    The core is scaled by its diagonal and inverted in float64 where there is one: a direction a
    million times below the largest is kept, as the columns of O and Y are graded like the
    directions themselves. Rounding leaves about eps times ``energy``
    in the norm of a column of Y for each row: a column with less energy than that would blow the
    rounding up when it is divided by the root of its energy.
    """
    core = _wide_product(xp, image, basis)
    eps = float(xp.finfo(basis.dtype).eps)
    scale = inverse_root(xp, xp.linalg.diagonal(core), _ROUNDING * eps * energy)
    values, vectors = top_eigh(xp, scale[:, None] * core * scale, core.shape[0])
    root = (scale[:, None] * vectors) * inverse_root(xp, values, core.shape[0] * eps)
    return cast(xp, root, image.dtype).T @ image


def inverse_root(xp: Namespace, values: Array, cutoff: Array | float) -> Array:
    """Return values^-1/2, and 0 where a value is not above the cut-off."""
    kept = values > cutoff
    return xp.where(kept, 1.0 / xp.sqrt(xp.where(kept, values, 1.0)), 0.0)
