"""Digest of the code of a callable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

#: Letters of a digest that are kept.
_LETTERS = 16
_PLAIN = (str, bytes, int, float, bool, type(None))


def code_digest(call: Callable[..., Any] | None) -> str:
    """Return a short digest of the code of a callable, and of its plain bound arguments.

    Variables from outside of a function do not count: they may be counters or models.

    Examples
    --------
    >>> code_digest(lambda x: x + 1) == code_digest(lambda x: x + 1)
    True
    >>> code_digest(lambda x: x + 1) == code_digest(lambda x: x + 2)
    False
    """
    return hashlib.sha256(repr(_callable_contents(call)).encode()).hexdigest()[:_LETTERS]


def _callable_contents(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (tuple, list, frozenset)):
        items = [_callable_contents(item) for item in value]
        return sorted(items, key=repr) if isinstance(value, frozenset) else items
    if isinstance(value, Mapping):
        return [(key, _callable_contents(item)) for key, item in value.items()]
    if isinstance(value, CodeType):
        return value.co_code.hex(), value.co_names, _callable_contents(value.co_consts)
    if isinstance(value, FunctionType):
        return _callable_contents((value.__code__, value.__defaults__, value.__kwdefaults__))
    if isinstance(value, MethodType):
        return _callable_contents(value.__func__)
    if isinstance(value, partial):
        return _callable_contents((value.func, value.args, value.keywords))
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return value.__qualname__
    call = vars(type(value)).get("__call__")
    return type(value).__qualname__, _callable_contents(call) if isinstance(
        call, FunctionType
    ) else None
