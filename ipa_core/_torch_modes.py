"""Modes of torch that a caller may have set: autograd, inference mode and autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

from array_api_compat import is_torch_array

Method = TypeVar("Method", bound=Callable[..., Any])


def torch_module() -> Any:
    """Return torch, imported where a tensor shows that it is there."""
    import torch

    return torch


def isolated(array: object) -> AbstractContextManager[object]:
    """Return a context in which torch's autocast and inference mode do not affect the results.

    Arrays made in it are ordinary tensors, of the same values as outside; nothing is recorded for
    autograd. A no-op for the other libraries.
    """
    if not is_torch_array(array):
        return nullcontext()
    torch = torch_module()
    recorded = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    if not recorded and not _is_autocast(array):  # as in most updates of a model's learners
        return nullcontext()
    return _isolated(array)


@contextmanager
def _isolated(array: object) -> Iterator[None]:
    with recorded_nowhere(), no_autocast(array):
        yield


def isolated_method(method: Method) -> Method:
    """Let a method of a learner run isolated from the modes that its ``_template`` obeys."""

    @wraps(method)
    def run(learner: Any, *args: Any) -> Any:
        with isolated(learner._template):
            return method(learner, *args)

    return cast(Method, run)


@contextmanager
def recorded_nowhere() -> Iterator[None]:
    """Leave torch's inference mode and autograd."""
    torch = torch_module()
    inferring = torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if inferring else nullcontext(), torch.no_grad():
        yield


def no_autocast(array: Any) -> AbstractContextManager[object]:
    """Return a context without torch's autocast on the device of ``array``, autograd untouched."""
    if not is_torch_array(array) or not _is_autocast(array):
        return nullcontext()
    disabled: AbstractContextManager[object] = torch_module().autocast(
        array.device.type, enabled=False
    )
    return disabled


def _is_autocast(tensor: Any) -> bool:
    """Return whether torch's autocast is on for the device of a tensor."""
    torch, kind = torch_module(), tensor.device.type
    return bool(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))
