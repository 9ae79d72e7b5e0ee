"""Serialization of projectors and learner states: safetensors with version and digest."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from ipa_core import _array
from ipa_core._array import Array, Device
from ipa_core.errors import ArrayTypeError, FileFormatError, IPAError, with_context
from ipa_core.io.atomic_write import replace_file
from ipa_core.io.file_header import FileFormat, reading
from ipa_core.io.paths import input_file
from ipa_core.projector import Projector
from ipa_core.settings import integer, number

_PROJECTORS = FileFormat("ipa-projectors", 1)
_STATE = FileFormat("ipa-learner-state", 2)
_PARTS = ("components", "mean", "energies")
# Share by which numbers of 8 bits, which energies may have been cast to, are rounded at most.
_ROUNDING = 1 / 8


def save(projectors: Projector | Mapping[str, Projector], path: str | os.PathLike[str]) -> None:
    """Write a projector, or a mapping from layer names to projectors, to a safetensors file.

    A projector that several names share is written once. The file is written atomically.

    Parameters
    ----------
    projectors : Projector or mapping of str to Projector
        In any library, on any device.
    path : path-like
        A regular file or a new name; its folder must exist. Arrays of bfloat16 become float32.

    Raises
    ------
    PathError
        If the file cannot be written.
    FileFormatError
        If a projector has values that `load` refuses: not finite, negative energies, or energies
        above the total.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from ipa_core import fit_projector, load, save
    >>> projector = fit_projector(np.eye(3), rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save({"q": projector, "k": projector}, f"{folder}/p.safetensors")
    ...     again = load(f"{folder}/p.safetensors")
    >>> again["q"] is again["k"]
    True
    """
    single = isinstance(projectors, Projector)
    named = {"": projectors} if isinstance(projectors, Projector) else _named(projectors)
    owners: dict[int, str] = {}
    tensors: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for name, projector in named.items():
        owner = owners.setdefault(id(projector), name)
        if owner != name:
            entries[name] = {"same_as": owner}
            continue
        entries[name] = {"total_energy": projector.total_energy, "samples": projector.samples}
        tensors |= _arrays(name, projector)
    content = {"single": single, "projectors": entries}
    replace_file(path, _pack(_PROJECTORS, content, tensors))


def _named(projectors: Any) -> dict[str, Projector]:
    if isinstance(projectors, Mapping):
        named = dict(projectors)
        if all(isinstance(key, str) and isinstance(p, Projector) for key, p in named.items()):
            return named
    raise ArrayTypeError(
        "expected a Projector, or a mapping from names to projectors, got "
        f"{reprlib.repr(projectors)}"
    )


def load(
    path: str | os.PathLike[str], *, library: ModuleType = np, device: Device | None = None
) -> Any:
    """Read what `save` wrote: a `Projector`, or a dict from names to projectors.

    Parameters
    ----------
    path : path-like
        The file.
    library, device : optional
        Library and device of the arrays; default NumPy.

    Raises
    ------
    FileFormatError
        If the file was not written by `save`, is damaged, or is of another version.
    PathError
        If the file cannot be read; a `MissingFileError` if there is none.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from ipa_core import fit_projector, load, save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(fit_projector(np.eye(3), rank=2), f"{folder}/p.safetensors")
    ...     load(f"{folder}/p.safetensors")
    Projector(rank=2, features=3, captured=0.667, samples=3, numpy float64 on cpu)
    """
    content, tensors = _read(path, _PROJECTORS)
    with reading(path, "named projectors"):
        entries = content["projectors"]
        distinct = {
            name: _projector(name, entry, tensors, path)
            for name, entry in entries.items()
            if "same_as" not in entry
        }
        named = {name: distinct[entry.get("same_as", name)] for name, entry in entries.items()}
        named = {"": named[""]} if content["single"] else named
    moved = {id(p): p.to(library, device=device) for p in distinct.values()}
    loaded = {name: moved[id(projector)] for name, projector in named.items()}
    return loaded[""] if content["single"] else loaded


def save_state(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a learner's `state_dict` to a safetensors file, atomically.

    Parameters
    ----------
    state : mapping
        From `Learner.state_dict`.
    path : path-like
        The file; its folder must exist.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from ipa_core import IncrementalPCA, load_state, save_state
    >>> learner = IncrementalPCA(rank=2).update(np.ones((5, 3)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(learner.state_dict(), f"{folder}/state.safetensors")
    ...     state = load_state(f"{folder}/state.safetensors")
    >>> IncrementalPCA(rank=2).load_state_dict(state).samples
    5
    """
    replace_file(path, pack_state(state))


def pack_state(state: Mapping[str, Any]) -> bytes:
    """Return the bytes that `save_state` writes, for example to send them to another process."""
    if not isinstance(state, Mapping):
        raise FileFormatError(f"expected the state of a learner, got {type(state).__name__}")
    tensors = {key: value for key, value in state.items() if _array.is_array(value)}
    plain = {key: value for key, value in state.items() if key not in tensors}
    return _pack(_STATE, plain, tensors)


def load_state(
    path: str | os.PathLike[str], *, library: ModuleType = np, device: Device | None = None
) -> dict[str, Any]:
    """Read a learner's state, in any library, for `Learner.load_state_dict`.

    Raises
    ------
    FileFormatError
        If the file was not written by `save_state`, is damaged, or is of another version.

    Examples
    --------
    >>> import numpy as np, tempfile, torch
    >>> from ipa_core import IncrementalPCA, load_state, save_state
    >>> learner = IncrementalPCA(rank=2).update(np.ones((5, 3), dtype=np.float32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(learner.state_dict(), f"{folder}/state.safetensors")
    ...     state = load_state(f"{folder}/state.safetensors", library=torch)
    >>> IncrementalPCA(rank=2).load_state_dict(state)
    <IncrementalPCA(rank=2, center=False, seed=0): 5 rows of 3 features>
    """
    return _state_from_file(*_read(path, _STATE), library, device)


def unpack_state(
    data: bytes, *, library: ModuleType = np, device: Device | None = None
) -> dict[str, Any]:
    """Return the state from the bytes of `pack_state`.

    Raises
    ------
    FileFormatError
        If the bytes are not those of a state, or are damaged.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        arrays = from_bytes(data)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileFormatError(f"expected the bytes of a state, got {error}") from error
    content = _STATE.unseal(header, "a packed state", arrays)
    return _state_from_file(content, arrays, library, device)


def _state_from_file(
    plain: dict[str, Any], tensors: dict[str, Any], library: ModuleType, device: Device | None
) -> dict[str, Any]:
    xp = _array.as_namespace(library)
    return plain | {key: _array.convert(value, xp, device, None) for key, value in tensors.items()}


def _projector(
    name: str, entry: Mapping[str, Any], tensors: Mapping[str, Any], path: str | os.PathLike[str]
) -> Projector:
    try:
        components, mean, energies = (tensors[f"{name}/{part}"] for part in _PARTS)
        total = number("entry 'total_energy'", entry["total_energy"], error=FileFormatError)
        samples = integer("entry 'samples'", entry["samples"], least=0, error=FileFormatError)
        projector = Projector(components, mean, energies, total, samples)
        _check_values(projector)
        return projector
    except IPAError as error:
        raise FileFormatError(f"{path}: projector {name!r}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path}: expected a whole projector {name!r}, got {error}"
        ) from error


def _arrays(name: str, projector: Projector) -> dict[str, Any]:
    """Return the arrays of a projector on the host, by the names of a file."""
    host = projector.to(np)
    try:
        _check_values(host)
    except FileFormatError as error:
        raise with_context(error, f"projector {name!r}") from error
    return {f"{name}/{part}": getattr(host, part) for part in _PARTS}


def _check_values(projector: Projector) -> None:
    """Check that the arrays of a projector on the host are finite, and the energies possible."""
    for part in _PARTS:
        if not np.isfinite(getattr(projector, part)).all():
            raise FileFormatError(f"expected finite {part}, got NaN or infinity")
    if (lowest := projector.energies.min()) < 0:
        raise FileFormatError(f"expected energies of at least 0, got {lowest}")
    captured, total = projector.energies.sum(dtype=np.float64), projector.total_energy
    if captured > total * (1 + _ROUNDING):
        raise FileFormatError(
            f"expected energies that sum to total_energy, {total}, at most, got {captured}; pass "
            "the summed squared lengths of the centered rows as total_energy"
        )


def _pack(kind: FileFormat, content: Mapping[str, Any], tensors: Mapping[str, Array]) -> bytes:
    try:
        arrays = {key: np.ascontiguousarray(_array.to_numpy(v)) for key, v in tensors.items()}
        data: bytes = to_bytes(arrays, metadata=kind.seal(content, arrays))
        return data
    except (TypeError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise FileFormatError(
            f"expected contents that a file can hold, names, numbers and arrays, got {error}"
        ) from error


def _read(path: str | os.PathLike[str], kind: FileFormat) -> tuple[dict[str, Any], dict[str, Any]]:
    path = input_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileFormatError(f"{path}: expected a safetensors file, got {error}") from error
    return kind.unseal(header, path, arrays), arrays
