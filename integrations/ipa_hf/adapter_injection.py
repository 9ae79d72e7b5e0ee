"""Injection of adapters by PEFT: a model that stays as it was after an error."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from ipa_core.errors import IPAError, SettingError

_PEFT_ERRORS = (
    ArithmeticError,
    AttributeError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    re.error,
)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Remove the adapters that were injected into a model within the context, after an error.

    Restored are the adapters of a PEFT model, the submodules of all modules and ``requires_grad``
    of all parameters.
    """
    children = [(module, dict(module._modules)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapters = {*getattr(model, "peft_config", ())}
    try:
        yield
    except BaseException:
        _remove_adapters({*getattr(model, "peft_config", ())} - adapters, model)
        for module, modules in children:
            module._modules.clear()
            module._modules.update(modules)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _remove_adapters(names: Collection[str], model: nn.Module) -> None:
    """Remove adapters from the records of PEFT."""
    if isinstance(model, PeftModel):
        for name in names:
            model.delete_adapter(name)
    elif names:
        del model.peft_config


@contextmanager
def peft_errors(expected: str, cure: str) -> Iterator[None]:
    """Turn errors of PEFT into one that says what was expected, and the cure.

    Raises
    ------
    SettingError
        From any error of PEFT within the context.
    """
    try:
        yield
    except _PEFT_ERRORS as error:
        if isinstance(error, IPAError):
            raise
        raise SettingError(
            f"expected {expected}, got {type(error).__name__}: {error}; {cure}"
        ) from error
