"""Eigenvalues and eigenvectors of a symmetric matrix."""

from __future__ import annotations

import array_api_compat

from ipa_core._array.inspection import device
from ipa_core._array.namespaces import namespace
from ipa_core._array.transfer import from_numpy, to_numpy
from ipa_core._array.types import Array, Namespace

# Features up to which a symmetric matrix of an accelerator is decomposed on the host.
_SMALL = 512


def leading_eigh(xp: Namespace, matrix: Array, count: int) -> tuple[Array, Array]:
    """Return the ``count`` largest eigenvalues, decreasing, and their eigenvectors as columns.

    Small matrices of an accelerator are decomposed on the host: LAPACK and the transfer are faster
    than the device's solvers, some of which fail on zeros and on equal eigenvalues.
    """
    if matrix.shape[0] > _SMALL or not _on_accelerator(matrix):
        return _decompose(xp, matrix, count)
    host = to_numpy(matrix)
    parts = _decompose(namespace(host), host, count)
    values, vectors = (from_numpy(xp, part, device(matrix), matrix.dtype) for part in parts)
    return values, vectors


def _decompose(xp: Namespace, matrix: Array, count: int) -> tuple[Array, Array]:
    values, vectors = xp.linalg.eigh((matrix + matrix.T) / 2)
    leading = xp.flip(values)[:count]
    return xp.clip(leading, min=0.0), xp.flip(vectors, axis=1)[:, :count]


def _on_accelerator(array: Array) -> bool:
    """Return whether an array is on a device with solvers other than LAPACK."""
    if array_api_compat.is_torch_array(array):
        return bool(array.device.type != "cpu")
    return bool(array_api_compat.is_cupy_array(array))
