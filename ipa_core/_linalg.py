"""The small dense algebra that the learners share. Every function is pure."""

from __future__ import annotations

from ipa_core._array import Array, Namespace, cast, device, eigh, row_energies, wide_dtype
from ipa_core._threads import on_one_thread

# Energy of a column of a sketch that is all rounding, in units of eps times that of a row.
_ROUNDING = 10.0
# Columns of a matrix that are cast to float64 at a time.
_CAST_AT_A_TIME = 4096


def gram(xp: Namespace, rows: Array) -> Array:
    """Return rows rows^T (m, m) in float64 where there is one.

    The products are taken in float64 as well: one outlying coordinate a thousand times the rest
    costs a float32 Gram matrix up to 1e-2 of the captured energy.
    """
    wide = wide_dtype(xp, device(rows))
    parts = (cast(xp, rows[:, part], wide) for part in _slices(rows.shape[1]))
    return sum(part @ part.T for part in parts)


def _wide_product(xp: Namespace, left: Array, right: Array) -> Array:
    """Return a product of matrices in float64 where there is one, without casting them whole."""
    wide = wide_dtype(xp, device(left))
    slices = _slices(left.shape[1])
    return sum(cast(xp, left[:, part], wide) @ cast(xp, right[part, :], wide) for part in slices)


def _slices(length: int) -> list[slice]:
    """Return the columns that are cast to float64 at a time."""
    starts = range(0, length, _CAST_AT_A_TIME)
    return [slice(start, min(start + _CAST_AT_A_TIME, length)) for start in starts]


@on_one_thread
def top_eigh(xp: Namespace, matrix: Array, count: int) -> tuple[Array, Array]:
    """Return the ``count`` largest eigenvalues, decreasing, and their eigenvectors as columns."""
    values, vectors = eigh(xp, (matrix + matrix.T) / 2)
    leading = xp.flip(values)[:count]
    return xp.clip(leading, min=0.0), xp.flip(vectors, axis=1)[:, :count]


@on_one_thread
def truncate_rows(xp: Namespace, rows: Array, keep: int) -> Array:
    """Return F (at most ``keep`` rows) with F^T F the best approximation of rows^T rows.

    The rows of F are orthogonal, by decreasing length. Cost O(m^2 d + m^3) for m rows of d
    features, or O(m d^2 + d^3) where that is less.
    """
    count, features = rows.shape
    if count <= keep:
        return rows
    if wide_dtype(xp, device(rows)) == rows.dtype:
        return _truncate_by_svd(xp, rows, keep)
    if count <= features:
        _, vectors = top_eigh(xp, gram(xp, rows), keep)
        return cast(xp, vectors, rows.dtype).T @ rows
    values, vectors = top_eigh(xp, gram(xp, rows.T), min(keep, features))
    return cast(xp, (vectors * xp.sqrt(values)).T, rows.dtype)


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
    """Return an orthonormal basis Q of the columns, in their order; zero columns are completed."""
    return xp.linalg.qr(columns, mode="reduced").Q


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
        return columns - columns @ (deviation / 2)
    return orthonormal_columns(xp, columns)


@on_one_thread
def principal_rows(xp: Namespace, factor: Array, rank: int) -> tuple[Array, Array]:
    """Return the leading ``rank`` directions of factor^T factor as orthogonal rows, and energies.

    A row's squared length is its energy; `fixed_basis` makes them orthonormal.
    """
    missing = rank + 1 - factor.shape[0]
    if missing > 0:
        # One zero row beyond the rank has a short factor decomposed, too: its rows may be oblique.
        shape = (missing, factor.shape[1])
        factor = xp.concat([factor, xp.zeros(shape, dtype=factor.dtype, device=device(factor))])
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
    wide = cast(xp, rows, wide_dtype(xp, device(rows)))
    squares = row_energies(xp, wide)
    # What is noise beside the longest row must not steer the completion of the basis.
    noise = xp.max(squares) * float(xp.finfo(rows.dtype).eps) ** 2
    scale = inverse_root(xp, squares, noise)
    basis = orthonormal_columns(xp, (wide * scale[:, None]).T).T
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
