"""Seam to the array libraries: namespaces, dtypes, devices, transfer to and from the host."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import accumulate
from types import ModuleType
from typing import Any, TypeAlias

import array_api_compat
import numpy as np

from ipa_core._sparse_rows import is_sparse, squared_lengths
from ipa_core._torch_modes import recorded_nowhere, torch_module
from ipa_core.errors import ArrayTypeError, SettingError

Array: TypeAlias = Any
HostArray: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
HostMask: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"
Namespace: TypeAlias = Any
Device: TypeAlias = Any
DType: TypeAlias = Any

_HOST_DTYPES = frozenset(
    ("bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64")
    + ("uint8", "uint16", "uint32", "uint64")
)
# Features up to which a symmetric matrix of an accelerator is decomposed on the host.
_SMALL = 512


def namespace(*arrays: Array) -> Namespace:
    """Return the array-API namespace that all ``arrays`` share."""
    for array in arrays:
        if not is_array(array):
            raise ArrayTypeError(
                f"expected an array of an array-API library, got {type(array).__name__}; "
                f"{conversion_hint(array) or 'convert it first, for example with numpy.asarray'}"
            )
    try:
        return array_api_compat.array_namespace(*arrays)
    except TypeError as error:
        kinds = ", ".join(sorted({type(array).__module__.split(".")[0] for array in arrays}))
        raise ArrayTypeError(f"expected arrays of one library, got {kinds}") from error


def as_namespace(library: ModuleType | Namespace) -> Namespace:
    """Return the array-API namespace of a library given as a module (``torch``, ``numpy``)."""
    if getattr(library, "__name__", None) in ("numpy", "torch", "cupy"):
        return array_api_compat.array_namespace(library.zeros(0))
    if not callable(getattr(library, "__array_namespace_info__", None)):
        raise SettingError(
            "expected the module of an array library (numpy, torch, cupy, jax.numpy), got "
            f"{reprlib.repr(library)}"
        )
    return library


def is_array(value: object) -> bool:
    return not isinstance(value, type) and bool(array_api_compat.is_array_api_obj(value))


def conversion_hint(value: Any) -> str | None:
    """Return how to convert an object that holds rows but is no array, None if unknown."""
    if hasattr(value, "nnz") and hasattr(value, "toarray"):
        return "pass dense rows of it, x[i : i + 1024].toarray(); learners take sparse rows"
    if hasattr(value, "nnz") and hasattr(value, "todense"):
        return "pass dense rows of a sparse array, x[i : i + 1024].todense()"
    if hasattr(value, "__dask_graph__"):
        return "pass a Dask array to fit_projector as the stream, or its value, x.compute()"
    if hasattr(value, "to_numpy"):
        return "pass its values, x.to_numpy()"
    return None


def check_array(array: Array) -> Namespace:
    """Return the namespace of an array of dense real floating values.

    Raises
    ------
    ArrayTypeError
        If the object is anything else; the message says how to convert it.
    """
    xp = namespace(array)
    if form := _unsupported_form(array):
        raise ArrayTypeError(f"expected a dense array with values, got {form}")
    if xp.isdtype(array.dtype, "complex floating"):
        raise ArrayTypeError(
            f"expected a real floating dtype, got {array.dtype}; pass real and imaginary parts as "
            "features, concatenated along the last axis"
        )
    if not xp.isdtype(array.dtype, "real floating"):
        raise ArrayTypeError(
            f"expected a real floating dtype, got {array.dtype}; convert it to float32 first"
        )
    return xp


def _unsupported_form(array: Array) -> str | None:
    """Return what is not supported about an array, and the cure; None for a dense array."""
    if hasattr(array, "__dask_graph__"):
        return f"a Dask array; {conversion_hint(array)}"
    if array_api_compat.is_numpy_array(array):
        if isinstance(array, np.ma.MaskedArray):
            return "a masked array; pass x.filled(0) with weights ~x.mask.any(axis=-1)"
        return None
    if not array_api_compat.is_torch_array(array):
        return None
    if hasattr(array, "get_mask"):
        return "a masked tensor; pass x.to_tensor(0) with row weights"
    if array.is_nested:
        return "a nested tensor; pass a list of its parts, x.unbind()"
    if array.layout != torch_module().strided:
        return "a sparse tensor; pass x.to_dense()"
    if array.is_meta:
        return "a tensor on the meta device, which has no values; load it first"
    return None


def detached(array: Array) -> Array:
    """Return an array outside any autograd graph, without the operators of a subclass."""
    if array_api_compat.is_torch_array(array):
        named = any(getattr(array, "names", ()))  # removed from recent versions of torch
        tensor: Any = array.detach()
        return tensor.rename(None) if named else tensor
    return np.asarray(array) if array_api_compat.is_numpy_array(array) else array


def device(array: Array) -> Device:
    return array_api_compat.device(array)


def describe(array: Array) -> str:
    """Return library, dtype and device in words."""
    return f"{type(array).__module__.split('.')[0]} {array.dtype} on {device(array)}"


def state_dtype(xp: Namespace, array: Array) -> DType:
    """Return the dtype of a learner's state: float64 for inputs wider than float32, else float32.

    Long doubles and other byte orders become the library's float64.
    """
    return xp.float64 if xp.finfo(array.dtype).bits > 32 else xp.float32


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
    torch = torch_module()
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
        squares = [
            squared_lengths(rows) if is_sparse(rows) else on_host(xp.vecdot(rows, rows))
            for rows in matrices
        ]
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


def rounded(values: HostArray, dtype: DType) -> HostArray:
    """Return host numbers rounded to a dtype of any library."""
    with ignore_overflow():
        return values.astype(dtype_name(dtype)).astype(np.float64)


def to_host_async(array: Array) -> Callable[[], HostArray]:
    """Start to copy an array to the host; the returned callable waits for the copy.

    On an accelerator of torch with streams (CUDA, ROCm, XPU, NPU) it waits for an event, not for
    the device, which continues with later work. JAX is asynchronous by itself.
    """
    if array_api_compat.is_torch_array(array) and _has_streams(array.device):
        torch = torch_module()
        host = torch.empty(array.shape, dtype=array.dtype, device="cpu", pin_memory=True)
        host.copy_(array.detach(), non_blocking=True)
        arrived = _accelerator().current_stream(array.device).record_event()

        def read() -> HostArray:
            arrived.synchronize()
            return on_host(host)

        return read
    return partial(on_host, array)


def _has_streams(on: Device) -> bool:
    """Return whether a device of torch is an accelerator with streams; MPS shares its memory."""
    return on.type not in ("cpu", "mps") and on.type == _accelerator_type()


def _accelerator() -> Any:
    """Return torch's module of accelerators, which is that of CUDA before torch 2.6."""
    return getattr(torch_module(), "accelerator", torch_module().cuda)


def _accelerator_type() -> str | None:
    if _accelerator() is torch_module().cuda:
        return "cuda"
    current = _accelerator().current_accelerator()
    return None if current is None else str(current.type)


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
    return array if array.dtype == dtype else xp.astype(array, dtype)


def to_numpy(array: Array) -> Any:
    """Return a NumPy copy or view of ``array``, from any device; bfloat16 becomes float32."""
    if array_api_compat.is_numpy_array(array):
        return array
    if array_api_compat.is_torch_array(array):
        tensor = array.detach().cpu()
        known = dtype_name(tensor.dtype) in _HOST_DTYPES
        return (tensor if known else tensor.float()).numpy()
    if array_api_compat.is_cupy_array(array):
        return array.get()
    if array_api_compat.is_jax_array(array):
        host = np.asarray(array)
        return host if dtype_name(host.dtype) in _HOST_DTYPES else host.astype(np.float32)
    return np.from_dlpack(array)


def host_values(values: Any) -> list[Any]:
    """Return the items of an array of any library, or of a sequence, on the host."""
    return list(to_numpy(values) if is_array(values) else values)


def dtype_name(dtype: DType) -> str:
    """Return a dtype's name in the array API, such as "float32"."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
    return str(name or str(dtype).rpartition(".")[2])


def from_numpy(xp: Namespace, array: Any, on: Device | None, dtype: DType) -> Array:
    """Return a copy of a NumPy ``array`` in library ``xp`` on device ``on``.

    The cast is on the host, as the device may not have the dtype of ``array``.
    """
    name = dtype_name(dtype)
    host = np.array(array, dtype=name if name in _HOST_DTYPES else np.float32)
    return cast(xp, xp.asarray(host, device=on), dtype)


def check_home(first: Array, second: Array, cure: str) -> Namespace:
    """Return the namespace that two arrays share, if they are on one device, too.

    Raises
    ------
    ArrayTypeError
        If library or device differ.
    """
    same = is_array(first) and is_array(second)
    same = same and array_api_compat.array_namespace(first) is array_api_compat.array_namespace(
        second
    )
    if not same or device(first) != device(second):
        raise ArrayTypeError(
            f"expected arrays of one library and device, {describe(first)}, "
            f"got {describe(second)}; {cure}"
        )
    return namespace(first)


def index_array(xp: Namespace, places: Any, on: Device) -> Array:
    """Return indices on a device, in the dtype that the device has for them."""
    defaults = xp.__array_namespace_info__().default_dtypes(device=on)
    return from_numpy(xp, places, on, defaults["indexing"])


def convert(array: Array, xp: Namespace, on: Device | None, dtype: DType | None) -> Array:
    """Return ``array`` in library ``xp``, by way of the host.

    Without a ``dtype`` it keeps its own, or takes the library's float32 where library or device has
    none such (float64 on many accelerators, bfloat16 in NumPy).

    Raises
    ------
    SettingError
        If the library has no such device or dtype.
    """
    with recorded_nowhere() if array_api_compat.is_torch_namespace(xp) else nullcontext():
        try:
            if dtype is None:
                dtype = _available_dtype(xp, array.dtype, on)
            return from_numpy(xp, to_numpy(array), on, dtype)
        except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            raise SettingError(
                f"expected a device and a dtype of {xp.__name__}, got device={on!r} and "
                f"dtype={dtype!r}: {error}"
            ) from error


def _available_dtype(xp: Namespace, dtype: DType, on: Device | None) -> DType:
    """Return the dtype of the same name in another library, or float32 in place of a float."""
    name = dtype_name(dtype)
    available = xp.__array_namespace_info__().dtypes(device=on)
    half = {"bfloat16", "float16"}  # not in the standard, but in some libraries
    if name in available or (name in half and hasattr(xp, name)):
        return getattr(xp, name)
    return xp.float32


def random_signs(shape: tuple[int, ...], seed: int, stream: int) -> Any:
    """Draw +1 / -1 on the host: equal numbers for every library and every worker."""
    generator = np.random.default_rng([seed, stream])
    return generator.choice(np.array([-1.0, 1.0]), size=shape)


def random_normal(shape: tuple[int, ...], seed: int, stream: int) -> Any:
    """Draw standard normal numbers on the host: equal numbers for every library."""
    return np.random.default_rng([seed, stream]).standard_normal(shape)
