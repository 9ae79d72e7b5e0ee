"""The small dense algebra that the learners share. Every function is pure."""

from __future__ import annotations

from ipa_core._array import Array, Namespace, cast, device, eigh, wide_dtype


def gram(xp: Namespace, rows: Array) -> Array:
    """Return rows rows^T (m, m) in float64 where there is one.

    The products are taken in float64 as well: one outlying coordinate a thousand times the rest
    costs a float32 Gram matrix up to 1e-2 of the captured energy.
    """
    wide = cast(xp, rows, wide_dtype(xp, device(rows)))
    return wide @ wide.T


def top_eigh(xp: Namespace, matrix: Array, count: int) -> tuple[Array, Array]:
    """Return the ``count`` largest eigenvalues, decreasing, and their eigenvectors as columns."""
    values, vectors = eigh(xp, (matrix + matrix.T) / 2)
    leading = xp.flip(values)[:count]
    return xp.clip(leading, min=0.0), xp.flip(vectors, axis=1)[:, :count]


def truncate_rows(xp: Namespace, rows: Array, keep: int) -> Array:
    """Return F (at most ``keep`` rows) with F^T F the best approximation of rows^T rows.

    The rows of F are orthogonal, by decreasing length. Cost O(m^2 d + m^3) for m rows of d
    features, or O(m d^2 + d^3) where that is less.
    """
    count, features = rows.shape
    if count <= keep:
        return rows
    if count <= features:
        _, vectors = top_eigh(xp, gram(xp, rows), keep)
        return cast(xp, vectors, rows.dtype).T @ rows
    values, vectors = top_eigh(xp, gram(xp, rows.T), min(keep, features))
    return cast(xp, (vectors * xp.sqrt(values)).T, rows.dtype)


def orthonormal_columns(xp: Namespace, columns: Array) -> Array:
    """Return an orthonormal basis Q of the columns, in their order; zero columns are completed."""
    return xp.linalg.qr(columns, mode="reduced").Q


def principal_rows(xp: Namespace, factor: Array, rank: int) -> tuple[Array, Array]:
    """Return the leading ``rank`` directions of factor^T factor as orthogonal rows, and energies.

    A row's squared length is its energy; `fixed_basis` makes them orthonormal.
    """
    rows = truncate_rows(xp, factor, rank)
    # A factor that is short already may have rows that are not orthogonal yet.
    _, vectors = top_eigh(xp, gram(xp, rows), rows.shape[0])
    rows = cast(xp, vectors, rows.dtype).T @ rows
    if rows.shape[0] < rank:
        missing = xp.zeros(
            (rank - rows.shape[0], rows.shape[1]), dtype=rows.dtype, device=device(rows)
        )
        rows = xp.concat([rows, missing])
    wide = cast(xp, rows, wide_dtype(xp, device(rows)))
    return rows, xp.vecdot(wide, wide)


def fixed_basis(xp: Namespace, rows: Array) -> Array:
    """Return orthonormal rows spanning ``rows`` in order, the largest entry of each positive."""
    wide = cast(xp, rows, wide_dtype(xp, device(rows)))
    squares = xp.vecdot(wide, wide)
    # What is noise beside the longest row must not steer the completion of the basis.
    noise = xp.max(squares) * float(xp.finfo(rows.dtype).eps) ** 2
    scale = inverse_root(xp, squares, noise)
    basis = orthonormal_columns(xp, (wide * scale[:, None]).T).T
    peak = xp.argmax(xp.abs(basis), axis=1)
    values = xp.take_along_axis(basis, peak[:, None], axis=1)
    return cast(xp, basis * (1.0 - 2.0 * cast(xp, values < 0, basis.dtype)), rows.dtype)


def nystrom_rows(xp: Namespace, basis: Array, image: Array) -> Array:
    """Return F with F^T F = Y (O^T Y)^-1 Y^T for the basis O (d, k) and the image Y^T (k, d).

    O may be any multiple of an orthonormal basis, if Y = C O for a moment C: the multiple cancels.

    The core O^T Y is scaled by its diagonal and inverted in float64 where there is one, below
    rounding cut off: it is the first thing to break when one direction outweighs the rest.
    """
    wide = wide_dtype(xp, device(basis))
    core = cast(xp, image, wide) @ cast(xp, basis, wide)
    diagonal = xp.linalg.diagonal(core)
    eps = float(xp.finfo(basis.dtype).eps)
    # Rounding leaves eps times the largest energy in a column of Y. Where a column carries less
    # than that, dividing by it would blow the rounding up.
    scale = inverse_root(xp, diagonal, eps * xp.max(diagonal))
    values, vectors = top_eigh(xp, scale[:, None] * core * scale, core.shape[0])
    root = (scale[:, None] * vectors) * inverse_root(xp, values, core.shape[0] * eps)
    return cast(xp, root, image.dtype).T @ image


def inverse_root(xp: Namespace, values: Array, cutoff: Array | float) -> Array:
    """Return values^-1/2, and 0 where a value is not above the cut-off."""
    kept = values > cutoff
    return xp.where(kept, 1.0 / xp.sqrt(xp.where(kept, values, 1.0)), 0.0)
