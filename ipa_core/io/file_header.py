"""Envelope of a file: format name, version, JSON content, and a digest over all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ipa_core.errors import FileFormatError, IPAError


@contextmanager
def reading(source: object, form: str) -> Iterator[None]:
    """Enclose the interpretation of a file's content, which may have any form.

    Raises
    ------
    FileFormatError
        Instead of an error that content of another form than ``form`` causes.
    """
    try:
        yield
    except IPAError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FileFormatError(
            f"{source}: expected {form}, got {type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True)
class FileFormat:
    """Name and version of a file format, which seals contents and opens them again.

    The header has string values only, as the metadata of a safetensors file must.

    Parameters
    ----------
    name : str
        Name of the format.
    version : int
        Version that is written, and the only version that is read.
    """

    name: str
    version: int

    def seal(
        self, content: Mapping[str, Any], arrays: Mapping[str, Any] | None = None
    ) -> dict[str, str]:
        """Return the header of a file with this content and these NumPy arrays."""
        text = json.dumps(content, allow_nan=False)
        return {
            "format": self.name,
            "format_version": str(self.version),
            "content": text,
            "sha256": self._digest(text, arrays or {}),
        }

    def unseal(
        self, header: Any, source: object, arrays: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the content of a header, after a check of format, version and digest.

        Raises
        ------
        FileFormatError
            If the format or its version is another, or a bit has changed; names ``source``.
        """
        if not isinstance(header, Mapping) or header.get("format") != self.name:
            kind = header.get("format") if isinstance(header, Mapping) else type(header).__name__
            raise FileFormatError(f"{source}: expected format {self.name!r}, got {kind!r}")
        version = header.get("format_version")
        if version != str(self.version):
            raise FileFormatError(
                f"{source}: expected format version {self.version}, got {version!r}; write the "
                "file again, or update ipa-projectors"
            )
        text = header.get("content")
        if not isinstance(text, str) or header.get("sha256") != self._digest(text, arrays or {}):
            raise FileFormatError(f"{source}: expected contents that match the digest, got others")
        with reading(source, "JSON content"):
            return dict(json.loads(text))

    def _digest(self, text: str, arrays: Mapping[str, Any]) -> str:
        """Hash format, content, and the names, dtypes, shapes and bytes of the arrays."""
        digest = hashlib.sha256(f"{self.name}\n{self.version}\n{text}\n".encode())
        for key in sorted(arrays):
            array = np.ascontiguousarray(arrays[key])
            digest.update(f"{key}\n{array.dtype}\n{array.shape}\n".encode())
            digest.update(array.data if array.size else b"")
        return digest.hexdigest()
