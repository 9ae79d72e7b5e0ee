"""Small decompositions on one thread.

Threads of a linear-algebra library wait for each other after every step of a decomposition. Where
another process keeps a core busy, a matrix of a hundred rows then takes up to a hundred times as
long; on an idle machine it is no faster than on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from typing import Any, TypeVar, cast

import array_api_compat

from ipa_core._torch_modes import torch_module

Function = TypeVar("Function", bound=Callable[..., Any])

# Operations (rows x columns^2) up to which a decomposition is small: some milliseconds.
_SMALL = 2**26


def on_one_thread(function: Function) -> Function:
    """Let a function of a namespace and a matrix run on one thread if the matrix is small.

    The matrix may come in pieces, a list or a tuple of them.
    """

    @wraps(function)
    def run(xp: Any, matrix: Any, *args: Any) -> Any:
        pieces = matrix if isinstance(matrix, (list, tuple)) else [matrix]
        shape = sum(piece.shape[0] for piece in pieces), pieces[0].shape[1]
        if max(shape) * min(shape) ** 2 > _SMALL:
            return function(xp, matrix, *args)
        with _one_thread(pieces[0]):
            return function(xp, matrix, *args)

    return cast(Function, run)


def _one_thread(matrix: Any) -> AbstractContextManager[object]:
    """Return a context in which the library that computes with a matrix has one thread."""
    if array_api_compat.is_torch_array(matrix) and matrix.device.type == "cpu":
        return _torch_thread()
    if array_api_compat.is_jax_array(matrix):  # has threads of its own
        return nullcontext()
    # NumPy, and accelerators, whose small matrices are decomposed on the host.
    blas = _blas()
    limit: AbstractContextManager[object] = blas.limit(limits=1) if blas else nullcontext()
    return limit


@contextmanager
def _torch_thread() -> Iterator[None]:
    """Set the number of torch's threads, which each thread of a program has for itself."""
    torch = torch_module()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _blas() -> Any:
    """Return the controller of the BLAS that is loaded, None if threadpoolctl is not installed.

    Its limits are the process's. It grants them to one thread of a program at a time.
    """
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController().select(user_api="blas")
