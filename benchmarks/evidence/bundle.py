"""Bundle files: tensors and settings in files of limited size.

Nothing is rounded. Weights that once were quantized to 4 bits are stored as such. Of other tensors
the bytes are stored by significance, all first bytes, all second bytes, and so on, and compressed:
signs and exponents take about a third of their size.
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
#: Numbers that share a least number and a step, as in GGUF's Q4_1, and their name in a manifest.
BLOCK, FOUR_BITS = 32, "4 bits"


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
    arrays, forms = {}, {}
    for name, tensor in tensors.items():
        quantized = _quantized(tensor)
        kind = str(tensor.dtype).removeprefix("torch.") if quantized is None else FOUR_BITS
        forms[name] = [kind, list(tensor.shape)]
        arrays |= {f"{name}/{n}": _planes(part) for n, part in enumerate(quantized or [tensor])}
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    content = stream.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    for number, start in enumerate(range(0, len(content), PART)):
        part = content[start : start + PART]
        path = folder / f"bundle-{number}.bin"
        path.write_bytes(part)
        parts[path.name] = hashlib.sha256(part).hexdigest()
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
    with np.load(io.BytesIO(content)) as arrays:
        for name, (kind, shape) in manifest["tensors"].items():
            if kind == FOUR_BITS:
                codes = _numbers(arrays[f"{name}/0"], torch.uint8).view(-1, BLOCK // 2)
                steps = _numbers(arrays[f"{name}/1"], torch.float16).view(2, -1, 1)
                numbers = _dequantized(codes, steps)
            else:
                numbers = _numbers(arrays[f"{name}/0"], getattr(torch, kind))
            tensors[name] = numbers.view(shape)
    return manifest["settings"], tensors


def _quantized(tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """Return codes, two in a byte, and steps and least numbers of blocks; None if they round."""
    if tensor.dtype != torch.float32 or not tensor.numel() or tensor.numel() % BLOCK:
        return None
    blocks = tensor.detach().cpu().reshape(-1, BLOCK)
    least = blocks.amin(1, keepdim=True)
    steps = torch.stack([(blocks.amax(1, keepdim=True) - least) / 15, least]).half()
    numbers = ((blocks - least) / steps[0].float().clamp_min(1e-30)).round().clamp(0, 15).byte()
    codes = 16 * numbers[:, ::2] + numbers[:, 1::2]
    return [codes, steps] if torch.equal(_dequantized(codes, steps), blocks) else None


def _dequantized(codes: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Return blocks of numbers in float32."""
    numbers = torch.stack([codes >> 4, codes & 15], 2).flatten(1)
    return steps[0].float() * numbers + steps[1].float()


def _planes(tensor: torch.Tensor) -> np.ndarray:
    """Return the bytes of a tensor by significance, shape (bytes of a number, numbers)."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return np.ascontiguousarray(flat.view(torch.uint8).reshape(-1, tensor.element_size()).T.numpy())


def _numbers(planes: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers whose bytes `_planes` gives, shape (numbers,)."""
    return torch.from_numpy(np.ascontiguousarray(planes.T)).view(dtype).flatten()


def _bytes(path: Path, cure: str) -> bytes:
    if not path.is_file():
        raise BundleError(f"expected {path}, got no such file; run {cure}")
    return path.read_bytes()
