"""Safetensors files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ipa_core.errors import (
    FileFormatError,
)
from ipa_core.io._formats.array_blocks import ROWS_AT_A_TIME, LabeledRows, check_rows
from ipa_core.io._formats.named_arrays import chosen, label_of
from ipa_core.optional_dependencies import import_optional


def read_safetensors(file: Path, key: str | None) -> Iterator[LabeledRows]:
    """Read the tensors of a safetensors file, 8,192 rows at a time."""
    try:
        with safe_open(file, framework=_framework(file, key)) as tensors:
            for name in chosen(file, [*tensors.keys()], key):
                rows = tensors.get_slice(name)
                count = rows.get_shape()[0]
                for start in range(0, count, ROWS_AT_A_TIME):
                    batch = rows[start : min(start + ROWS_AT_A_TIME, count)]
                    # bfloat16 comes as a torch tensor; the stream is NumPy for every dtype.
                    batch = batch.float().numpy() if hasattr(batch, "numpy") else batch
                    yield label_of(name, start, batch), batch
    except SafetensorError as error:
        raise FileFormatError(f"{file}: expected a safetensors file, got {error}") from error


def _framework(file: Path, key: str | None) -> str:
    """Return the safetensors framework for the file's dtypes: NumPy has no bfloat16.

    Raises
    ------
    FileFormatError
        If the file is not one of activations, or a tensor not one of rows; names the tensor.
    """
    with safe_open(file, framework="numpy") as tensors:
        kind = (tensors.metadata() or {}).get("format", "")
        if kind.startswith("ipa-"):
            raise FileFormatError(f"{file}: expected activations, got a file of format {kind!r}")
        dtypes = set()
        for name in chosen(file, [*tensors.keys()], key):
            rows = tensors.get_slice(name)
            check_rows(file, name, rows.get_shape(), rows.get_dtype())
            dtypes.add(rows.get_dtype())
    if "BF16" not in dtypes:
        return "numpy"
    import_optional("torch", extra="torch", user=f"{file}, in bfloat16,")
    return "pt"
