"""State of a learner: its entries, their form, and dataclasses of arrays and numbers."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ipa_core import _array
from ipa_core.errors import ArrayTypeError, FileFormatError, SettingError
from ipa_core.settings import check_instance, integer


def flatten(name: str, value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as entries ``name.field``; none for None."""
    if value is None:
        return {}
    return {f"{name}.{field.name}": getattr(value, field.name) for field in fields(value)}


def unflatten(name: str, cls: type, state: Mapping[str, Any]) -> Any:
    """Return the dataclass whose fields are entries ``name.field``; None if there are none.

    Raises
    ------
    FileFormatError
        If some of its entries are missing.
    """
    keys = {field.name: f"{name}.{field.name}" for field in fields(cls)}
    if not any(key in state for key in keys.values()):
        return None
    try:
        return cls(**{field: state[key] for field, key in keys.items()})
    except KeyError as error:
        raise FileFormatError(f"expected an entry {error} in the state, got none") from error


def entries_of(name: str, cls: type) -> tuple[dict[str, str], list[str]]:
    """Return the entries of a dataclass in a state: numbers with their types, and arrays."""
    types = {f"{name}.{field.name}": str(field.type) for field in fields(cls)}
    arrays = [key for key, kind in types.items() if "Array" in kind]
    return {key: kind for key, kind in types.items() if key not in arrays}, arrays


def check_state_of(kind: type, state: Any) -> None:
    """Check that a state is that of a learner of a class.

    Raises
    ------
    FileFormatError
        If it is of another class, or no state.
    """
    form = f"the state of a {kind.__name__}, from its state_dict"
    check_instance("the state", state, Mapping, form, error=FileFormatError)
    name = state.get("learner")
    if not isinstance(name, str) or name != kind.__name__:
        raise FileFormatError(f"expected the state of a {kind.__name__}, got {name!r}")


def check_settings(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that a state was learned with these settings.

    Raises
    ------
    SettingError
        If a setting differs.
    """
    for name, value in settings.items():
        if repr(state.get(name)) != repr(value):
            raise SettingError(
                f"expected a state learned with {name}={value!r}, got {state.get(name)!r}; "
                "build the learner with the state's settings"
            )


def check_state(
    state: Mapping[str, Any],
    *,
    numbers: Mapping[str, str],
    arrays: Iterable[str],
    values: Mapping[str, type],
) -> None:
    """Check the form of the entries of a state.

    Parameters
    ----------
    state : mapping
        From `Learner.state_dict`.
    numbers : mapping of str to str
        Names of the entries, and their types.
    arrays : iterable of str
        Names of the entries.
    values : mapping of str to type
        Dataclasses of which the fields are entries.

    Raises
    ------
    FileFormatError
        If an entry is missing or of another form.
    """
    check_numbers(state, numbers)
    template = state.get("template")
    if template is None:
        if state["samples"]:
            raise FileFormatError("expected the arrays of a learner with rows, got none")
        return
    if not _array.is_array(template) or template.ndim != 2 or template.shape[0] != 0:
        raise FileFormatError("expected a template of shape (0, features) in the state")
    check_arrays(state, ["template", "pending.x", "pending.weights", *arrays])
    _check_pending(state, int(template.shape[1]))
    if state["samples"] and not state["weight"] and "pending.x" not in state:
        raise FileFormatError("expected an entry 'weight' of the state above 0, got 0")
    for name, cls in values.items():
        inner_numbers, inner_arrays = entries_of(name, cls)
        if any(key in state for key in (*inner_numbers, *inner_arrays)):
            check_numbers(state, inner_numbers)
            check_arrays(state, inner_arrays)


def _check_pending(state: Mapping[str, Any], features: int) -> None:
    """Check that the pending rows of a state are a matrix, with a weight for each row, if any."""
    if "pending.x" not in state:
        return
    rows, weights = state["pending.x"], state.get("pending.weights")
    shape = () if rows is None else tuple(rows.shape)
    weighted = shape[:1] if weights is None else tuple(weights.shape)
    if shape[1:] != (features,) or weighted != shape[:1]:
        raise FileFormatError(
            f"expected pending rows of {features} features in the state, and a weight of each or "
            f"none, got shapes {shape} and {weighted}"
        )
    if weights is not None and bool((weights < 0).any()):
        raise FileFormatError(
            "expected numbers of at least 0 as entry 'pending.weights' of the state, got others"
        )


def check_numbers(state: Mapping[str, Any], types: Mapping[str, str]) -> None:
    """Check that entries of a state are numbers: flags, counts, sums of weights and energies.

    Parameters
    ----------
    state : mapping
    types : mapping of str to {"bool", "int", "float"}
        Types of the entries.

    Raises
    ------
    FileFormatError
        If an entry is missing, of another type, negative or not finite.
    """
    for name, kind in types.items():
        value = state.get(name)
        if kind == "int":
            integer(f"entry {name!r} of the state", value, least=0, error=FileFormatError)
            continue
        form = "True or False" if kind == "bool" else "a number of at least 0"
        valid = isinstance(value, (int, float)) and 0 <= value < math.inf
        if not valid or isinstance(value, bool) != (kind == "bool"):
            raise FileFormatError(
                f"expected {form} as entry {name!r} of the state, got {reprlib.repr(value)}"
            )


def check_arrays(state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Check that entries of a state are finite arrays like its template, where there are any.

    Raises
    ------
    FileFormatError
        If an entry is no finite matrix or vector of the template's library and device.
    """
    template = state.get("template")
    for name in names:
        array = state.get(name)
        if array is None:
            continue
        try:
            _array.check_array(array)
            _array.check_home(template, array, "pass a state as it was saved")
        except ArrayTypeError as error:
            raise FileFormatError(f"state entry {name!r}: {error}") from error
        if array.ndim not in (1, 2) or array.shape[-1] == 0:
            raise FileFormatError(
                f"expected a matrix or a vector as entry {name!r} of the state, got shape "
                f"{tuple(array.shape)}"
            )
        xp = _array.namespace(array)
        if not bool(xp.all(xp.isfinite(array))):
            raise FileFormatError(f"expected finite values as entry {name!r} of the state")
