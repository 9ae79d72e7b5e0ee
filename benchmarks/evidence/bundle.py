"""Bundle files: tensors and settings in files of limited size.

The bytes of a tensor's numbers are stored by significance, all first bytes, all second bytes, and
so on, and compressed: signs and exponents take about a third of their size. Nothing is rounded.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: Bytes of a file, at most.
PART = 58_000_000
MANIFEST = "bundle.json"


class BundleError(RuntimeError):
    """A bundle file is missing or has an unexpected digest."""


def write(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> list[Path]:
    """Write a bundle to a folder; return its files.

    Parameters
    ----------
    folder : Path
        Created if it is not there.
    settings : mapping
        Anything that JSON holds.
    tensors : mapping
        Dense tensors by name.
    """
    stream = io.BytesIO()
    np.savez_compressed(stream, **{name: _planes(tensor) for name, tensor in tensors.items()})
    content = stream.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    for number, start in enumerate(range(0, len(content), PART)):
        part = content[start : start + PART]
        path = folder / f"bundle-{number}.bin"
        path.write_bytes(part)
        parts[path.name] = hashlib.sha256(part).hexdigest()
    forms = {name: [str(x.dtype).split(".")[1], list(x.shape)] for name, x in tensors.items()}
    manifest = {"parts": parts, "tensors": forms, "settings": settings}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return [folder / MANIFEST, *(folder / name for name in parts)]


def read(folder: Path, cure: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return settings and tensors of a bundle.

    Parameters
    ----------
    folder : Path
    cure : str
        The command that writes the bundle, for errors.

    Raises
    ------
    BundleError
        If a file is missing, or is another than was written.
    """
    manifest = json.loads(_bytes(folder / MANIFEST, cure))
    content = b""
    for name, digest in manifest["parts"].items():
        part = _bytes(folder / name, cure)
        if hashlib.sha256(part).hexdigest() != digest:
            raise BundleError(f"expected {folder / name} as written, got other bytes; run {cure}")
        content += part
    tensors = {}
    with np.load(io.BytesIO(content)) as planes:
        for name, (dtype, shape) in manifest["tensors"].items():
            numbers = torch.from_numpy(np.ascontiguousarray(planes[name].T))
            tensors[name] = numbers.view(getattr(torch, dtype)).reshape(shape)
    return manifest["settings"], tensors


def _planes(tensor: torch.Tensor) -> np.ndarray:
    """Return the bytes of a tensor by significance, shape (bytes of a number, numbers)."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return np.ascontiguousarray(flat.view(torch.uint8).reshape(-1, tensor.element_size()).T.numpy())


def _bytes(path: Path, cure: str) -> bytes:
    if not path.is_file():
        raise BundleError(f"expected {path}, got no such file; run {cure}")
    return path.read_bytes()
