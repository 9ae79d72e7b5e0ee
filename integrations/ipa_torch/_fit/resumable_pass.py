"""Pass over batches that a later process can resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ipa_core.errors import FileFormatError, SettingError, StreamError
from ipa_core.io.file_header import reading
from ipa_core.settings import integer
from ipa_torch._fit.batch_digest import chained
from ipa_torch._fit.weight_digests import WeightDigests
from ipa_torch._layers.random_state import get_random_state, set_random_state


@dataclass
class ResumablePass:
    """Position of a pass in its batches.

    Parameters
    ----------
    settings : mapping
        Settings that the process that resumes must have.
    weights : WeightDigests or None
        Weights that it must have; None for a pass that is only counted.
    seen : int
        Number of batches so far.
    digest : str
        Digest of these batches.
    """

    settings: Mapping[str, Any]
    weights: WeightDigests | None
    seen: int = 0
    digest: str = ""

    def first_batch(self) -> AbstractContextManager[None]:
        """Enclose a batch; of the first one the weights before the target layers are recorded."""
        return nullcontext() if self.weights is None else self.weights.first_batch()

    def record_batch(self, batch: Any) -> None:
        """Count a batch."""
        self.seen += 1
        if self.weights is not None:
            self.digest = chained(self.digest, batch)

    def state(self) -> dict[str, Any]:
        """Return the position and the state of random numbers, as plain values."""
        return {
            "settings": dict(self.settings),
            "weights": {} if self.weights is None else self.weights.digests,
            "seen": self.seen,
            "digest": self.digest,
            "random": get_random_state().numpy().tobytes().hex(),
        }

    def check(self, state: Mapping[str, Any], folder: Path) -> None:
        """Check that a `state` in a folder is of a run with the same settings and weights.

        Raises
        ------
        FileFormatError
            If it is no state of a pass.
        SettingError
            If it is one of another run.
        """
        with reading(folder, "the state of a pass over batches"):
            integer("seen", state["seen"], least=0, error=FileFormatError)
            _random_state(state)
            weights = {name: str(digest) for name, digest in state["weights"].items()}
            _ = state["settings"], state["digest"]
        if state["settings"] != self.settings:
            raise SettingError(
                f"{folder}: expected settings {dict(self.settings)}, got those of another run, "
                f"{state['settings']}; use another folder, or delete this folder to start over"
            )
        if self.weights is not None:
            self.weights.check(weights, folder)

    def skip(self, batches: Iterator[Any], state: Mapping[str, Any], folder: Path) -> None:
        """Move to a `state` in a folder: read its batches, and restore its random numbers.

        Raises
        ------
        StreamError
            If the batches differ from those of the state.
        """
        count = state["seen"]
        for batch in batches if count else ():
            self.record_batch(batch)
            if self.seen == count:
                break
        if self.seen < count:
            raise StreamError(f"expected at least the {count} batches of {folder}, got {self.seen}")
        if self.digest != state["digest"]:
            raise StreamError(
                f"expected the first {count} batches to be those of {folder}, got others; "
                "read them in the same order (seed the loader), or delete the folder to start over"
            )
        set_random_state(_random_state(state))


def _random_state(state: Mapping[str, Any]) -> torch.Tensor:
    """Return the state of torch's random numbers on the host."""
    random = torch.frombuffer(bytearray.fromhex(state["random"]), dtype=torch.uint8)
    torch.Generator().set_state(random)  # raises if it is none
    return random
