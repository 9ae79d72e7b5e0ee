"""Names of new adapters, which are also those of modules and folders."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ipa_core.errors import SettingError
from ipa_core.settings import check_iterable


def check_adapter_name(name: Any) -> None:
    """Check that PEFT and a file system can take the name of a new adapter.

    Raises
    ------
    SettingError
        If they cannot.
    """
    if not _is_valid(name):
        raise SettingError(
            "expected adapter_name to be a string without dots and slashes, which PEFT saves into "
            f"a folder of this name, got {name!r:.80}; choose another name"
        )


def check_adapter_names(names: Iterable[str]) -> list[str]:
    """Return the names of several adapters; one string is one name.

    Raises
    ------
    SettingError
        If there are none, one is there twice, or PEFT or a file system cannot take it.
    """
    if not isinstance(names, str):
        check_iterable("names", names, "names of adapters")
    adapter_names = [names] if isinstance(names, str) else list(names)
    valid = bool(adapter_names) and all(map(_is_valid, adapter_names))
    if not valid or len(set(adapter_names)) < len(adapter_names):
        raise SettingError(
            "expected different names of adapters, one or more, without dots and slashes, got "
            f"{adapter_names}"
        )
    return adapter_names


def _is_valid(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and not set(name) & set("./\\\0")
