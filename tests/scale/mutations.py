"""Random mutations of files: python -m tests.scale.mutations [COUNT [SEED]].

Each mutated file must raise an error of the library, or give the content of the whole file. Prints
the outcomes by kind of file; ends with an error if other content was loaded, or another exception
left the library.
"""

import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ipa_core import ActivationStore, IncrementalPCA, fit_projector, load, load_state, save
from ipa_core import save_state as save_learner
from ipa_core.errors import IPAError
from ipa_hf.adapter_metadata import AdapterMetadata, LayerMetadata
from ipa_torch import (
    CheckpointConfig,
    adapter_state_dict,
    attach,
    fit_projectors,
    load_adapter,
    save_adapter,
    store_activations,
)

ROWS = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def flat(value):
    """Return a comparable form of what was loaded."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [flat(item) for item in value]
    return flat(vars(value)) if hasattr(value, "__dict__") else value


class ProjectorFile:
    """File of `ipa_core.save`."""

    def write(self, folder):
        rows = ROWS.numpy()
        save({"q": fit_projector(rows, 3), "k": fit_projector(rows, 2)}, folder / "p.safetensors")

    def read(self, folder):
        return load(folder / "p.safetensors")


class State:
    """File of `ipa_core.save_state`."""

    def write(self, folder):
        state = IncrementalPCA(rank=3).update(ROWS.numpy()).state_dict()
        save_learner(state, folder / "s.safetensors")

    def read(self, folder):
        return load_state(folder / "s.safetensors")


class Checkpoint:
    """Folder of a finished fit."""

    def write(self, folder):
        self.fit(folder)

    def fit(self, folder):
        config = CheckpointConfig(folder / "fit", batches=1, seconds=None)
        return fit_projectors(small(), ROWS.split(24), 2, checkpoint=config, progress=False)

    def read(self, folder):
        return dict(self.fit(folder))


class Store:
    """Folder of `store_activations`."""

    def write(self, folder):
        store_activations(small(), ROWS.split(24), folder, shard_bytes=600, progress=False)

    def read(self, folder):
        opened = ActivationStore(folder)
        return {name: [*layer] for name, layer in opened.items()}


class Adapter:
    """File of `ipa_torch.save_adapter`."""

    def write(self, folder):
        model = small()
        attach(model, fit_projectors(model, [ROWS], 2, progress=False))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        save_adapter(model, folder / "a.safetensors")

    def read(self, folder):
        model = small()
        load_adapter(model, folder / "a.safetensors")
        return adapter_state_dict(model)


class Metadata:
    """File of `ipa_hf` beside PEFT's files."""

    def write(self, folder):
        layer = LayerMetadata(rank=8, scale=1.5, captured=0.75, samples=4096)
        AdapterMetadata(True, "energy", {"a.q": layer, "a.k": layer}, "padding").write(folder)

    def read(self, folder):
        return AdapterMetadata.read(folder)


KINDS = (ProjectorFile, State, Checkpoint, Store, Adapter, Metadata)


def mutate(path, rng, others):
    """Change a file at random."""
    data = bytearray(path.read_bytes())
    size = max(1, len(data))
    at, length = rng.randrange(size), 1 + rng.randrange(min(64, size))
    kind = rng.choice(["bit", "byte", "cut", "more", "delete", "repeat", "zeros", "block", "other",
                       "digit", "gone"])  # fmt: skip
    if kind == "bit" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte" and data:
        data[at] = rng.randrange(256)
    elif kind == "cut":
        del data[at:]
    elif kind == "more":
        data += rng.randbytes(length)
    elif kind == "delete":
        del data[at : at + length]
    elif kind == "repeat":
        data[at:at] = data[at : at + length]
    elif kind == "zeros":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == "block":
        to = rng.randrange(size)
        block = data[at : at + length]
        data[to : to + len(block)] = block
    elif kind == "digit":  # of a header
        digits = [index for index, byte in enumerate(data[:4096]) if 48 <= byte <= 57]
        if digits:
            data[rng.choice(digits)] = 48 + rng.randrange(10)
    elif kind == "other":
        path.write_bytes(rng.choice(others).read_bytes())
        return
    else:
        path.unlink()
        return
    path.write_bytes(data)


def trial(kind, folder, expected, rng):
    """Mutate a file of a folder; return the outcome, and the error if it is not the library's."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(folder, Path(scratch) / "copy"))
        files = sorted(p for p in copy.rglob("*") if p.is_file() and p.name != ".lock")
        mutate(rng.choice(files), rng, files)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = flat(kind.read(copy))
        except IPAError:
            return "an error of the library", None
        except Exception as error:
            return "another error", error
        return ("the right content" if found == expected else "OTHER CONTENT"), None


def main(count, seed=0):
    """Try a number of mutations; return the outcomes by kind of file, and what went wrong."""
    rng, outcomes, problems = random.Random(seed), Counter(), []
    for number, make in enumerate(KINDS):
        kind = make()
        with tempfile.TemporaryDirectory() as folder:
            kind.write(Path(folder))
            expected = flat(kind.read(Path(folder)))
            for _ in range(count // len(KINDS) + (number < count % len(KINDS))):
                outcome, error = trial(kind, Path(folder), expected, rng)
                outcomes[make.__name__, outcome] += 1
                if outcome in ("another error", "OTHER CONTENT"):
                    problems.append(f"{make.__name__}: {outcome} {error!r}")
    return outcomes, problems


if __name__ == "__main__":
    found, wrong = main(*map(int, sys.argv[1:]))
    for (name, outcome), times in sorted(found.items()):
        print(f"{name}: {outcome} {times:,}")
    sys.exit("\n".join(wrong[:20]) or None)
