"""Seam to the array libraries: namespaces, dtypes, devices, transfer to and from the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from itertools import accumulate
from types import ModuleType
from typing import Any, TypeAlias

import array_api_compat
import numpy as np

from ipa_core.errors import ArrayTypeError

Array: TypeAlias = Any
HostArray: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
HostMask: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"
Namespace: TypeAlias = Any
Device: TypeAlias = Any
DType: TypeAlias = Any

# Features up to which a symmetric matrix of an accelerator is decomposed on the host.
_SMALL = 512


def namespace(*arrays: Array) -> Namespace:
    """Return the array-API namespace that all ``arrays`` share."""
    for array in arrays:
        if not is_array(array):
            raise ArrayTypeError(
                f"expected an array of an array-API library, got {type(array).__name__}; "
                "convert it first, for example with numpy.asarray"
            )
    try:
        return array_api_compat.array_namespace(*arrays)
    except TypeError as error:
        kinds = ", ".join(sorted({type(array).__module__.split(".")[0] for array in arrays}))
        raise ArrayTypeError(f"expected arrays of one library, got {kinds}") from error


def as_namespace(library: ModuleType | Namespace) -> Namespace:
    """Return the array-API namespace of a library given as a module (``torch``, ``numpy``)."""
    name = library.__name__
    if name in ("numpy", "torch", "cupy"):
        return array_api_compat.array_namespace(library.zeros(0))
    return library


def is_array(value: object) -> bool:
    return bool(array_api_compat.is_array_api_obj(value))


def is_floating(xp: Namespace, array: Array) -> bool:
    return bool(xp.isdtype(array.dtype, "real floating"))


def device(array: Array) -> Device:
    return array_api_compat.device(array)


def describe(array: Array) -> str:
    """Return library, dtype and device in words."""
    return f"{type(array).__module__.split('.')[0]} {array.dtype} on {device(array)}"


def detached(array: Array) -> Array:
    """Return ``array`` outside any autograd graph."""
    return array.detach() if array_api_compat.is_torch_array(array) else array


def state_dtype(xp: Namespace, array: Array) -> DType:
    """Return the dtype of a learner's state: the input's, but float32 at least."""
    return xp.float64 if array.dtype == xp.float64 else xp.float32


@cache
def wide_dtype(xp: Namespace, on: Device) -> DType:
    """Return float64 where library and device have it, else float32 (JAX by default, MPS)."""
    available = xp.__array_namespace_info__().dtypes(device=on, kind="real floating")
    return available.get("float64", xp.float32)


@cache
def half_dtype(xp: Namespace, on: Device) -> DType | None:
    """Return bfloat16 where the device multiplies it faster than float32, else None.

    Known of processors with bfloat16 instructions, through torch. The sums of a product are taken
    in float32 there, and its result is rounded.
    """
    if not array_api_compat.is_torch_namespace(xp) or getattr(on, "type", None) != "cpu":
        return None
    import torch

    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.bfloat16 if supported is not None and supported() else None


def ignore_overflow() -> AbstractContextManager[None]:
    """Return a context without NumPy's overflow warnings, for results that are checked later."""
    return np.errstate(over="ignore", invalid="ignore", under="ignore")


def squared_norms_async(xp: Namespace, matrices: Sequence[Array]) -> Callable[[], list[HostArray]]:
    """Ask for the squared lengths of the rows of matrices; the call of the result waits for them.

    All travel in one transfer. Each is one pass without a temporary: NumPy's ``vecdot`` does that;
    torch's builds the products first and takes up to fifty times as long as its norm.
    """
    if array_api_compat.is_numpy_namespace(xp):
        squares = [on_host(xp.vecdot(rows, rows)) for rows in matrices]
        return lambda: squares
    if not matrices:
        return list
    lengths = [xp.linalg.vector_norm(_single(xp, rows), axis=-1) for rows in matrices]
    read = to_host_async(lengths[0] if len(lengths) == 1 else xp.concat(lengths))
    ends = list(accumulate(int(rows.shape[0]) for rows in matrices))
    return lambda: np.split(read() ** 2, ends[:-1])


def _single(xp: Namespace, rows: Array) -> Array:
    """Return rows in float32 at least: lengths in half precision would have two digits."""
    return rows if rows.dtype == xp.float64 else cast(xp, rows, xp.float32)


def on_host(array: Array) -> HostArray:
    """Return a float64 copy on the host, for the sums that control the computation."""
    return np.array(to_numpy(array), dtype=np.float64)


def to_host_async(array: Array) -> Callable[[], HostArray]:
    """Start to copy an array to the host; the returned callable waits for the copy.

    On CUDA it waits for an event, not for the device, which continues with later work. JAX is
    asynchronous by itself.
    """
    if array_api_compat.is_torch_array(array) and array.is_cuda:
        import torch

        host = torch.empty(array.shape, dtype=array.dtype, device="cpu", pin_memory=True)
        host.copy_(array.detach(), non_blocking=True)
        arrived = torch.cuda.current_stream(array.device).record_event()

        def read() -> HostArray:
            arrived.synchronize()
            return on_host(host)

        return read
    return partial(on_host, array)


def eigh(xp: Namespace, matrix: Array) -> tuple[Array, Array]:
    """Return eigenvalues, increasing, and eigenvectors of a symmetric matrix.

    Small matrices of an accelerator are decomposed on the host: LAPACK and the transfer are faster
    than the device's solvers, some of which fail on zeros and on equal eigenvalues.
    """
    if matrix.shape[0] > _SMALL or not _on_accelerator(matrix):
        values, vectors = xp.linalg.eigh(matrix)
        return values, vectors
    decomposition = np.linalg.eigh(to_numpy(matrix))
    values, vectors = (from_numpy(xp, part, device(matrix), matrix.dtype) for part in decomposition)
    return values, vectors


def _on_accelerator(array: Array) -> bool:
    """Return whether an array is on a device with solvers other than LAPACK."""
    if array_api_compat.is_torch_array(array):
        return bool(array.device.type != "cpu")
    return bool(array_api_compat.is_cupy_array(array))


def host_ones(count: int) -> HostArray:
    return np.ones(count)


def host_concat(parts: Sequence[HostArray]) -> HostArray:
    return np.concatenate(parts)


def group_sums(values: HostArray | HostMask, ends: list[int]) -> list[float]:
    """Return the sum of each group of values, given where the groups end."""
    sums: list[float] = np.add.reduceat(values, [0, *ends[:-1]], dtype=np.float64).tolist()
    return sums


def zero_where(values: HostArray, mask: HostMask) -> HostArray:
    """Return values, and 0 where the mask is true."""
    return np.where(mask, 0.0, values)


def zero_rows(xp: Namespace, matrix: Array, mask: HostMask) -> Array:
    """Return a matrix with zeros in the rows where a mask on the host is true."""
    gone = from_numpy(xp, mask, device(matrix), xp.bool)
    return xp.where(gone[:, None], xp.zeros_like(matrix), matrix)


def cast(xp: Namespace, array: Array, dtype: DType) -> Array:
    return xp.astype(array, dtype, copy=False)


def to_numpy(array: Array) -> Any:
    """Return a NumPy copy or view of ``array``, from any device."""
    if array_api_compat.is_torch_array(array):
        return array.detach().cpu().numpy()
    if array_api_compat.is_cupy_array(array):
        return array.get()
    return np.from_dlpack(array) if not array_api_compat.is_numpy_array(array) else array


def from_numpy(xp: Namespace, array: Any, on: Device, dtype: DType) -> Array:
    """Return a copy of a NumPy ``array`` in library ``xp`` on device ``on``."""
    return cast(xp, xp.asarray(np.array(array), device=on), dtype)


def convert(array: Array, xp: Namespace, on: Device | None, dtype: DType | None) -> Array:
    """Return ``array`` in library ``xp``, by way of the host."""
    host = np.array(to_numpy(array))
    moved = xp.asarray(host, device=on)
    return moved if dtype is None else cast(xp, moved, dtype)


def random_signs(shape: tuple[int, ...], seed: int, stream: int) -> Any:
    """Draw +1 / -1 on the host: equal numbers for every library and every worker."""
    generator = np.random.default_rng([seed, stream])
    return generator.choice(np.array([-1.0, 1.0]), size=shape)


def random_normal(shape: tuple[int, ...], seed: int, stream: int) -> Any:
    """Draw standard normal numbers on the host: equal numbers for every library."""
    return np.random.default_rng([seed, stream]).standard_normal(shape)
