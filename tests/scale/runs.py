"""Runs that are killed: what a child process does, and a kill -9 at a moment of its work."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[2]


def model():
    """Return a small model with a shared input and a convolution, the same each time."""
    torch.manual_seed(0)
    return Net().eval()


class Net(nn.Module):
    """Query and value share an input, a convolution draws patches at random, and a pixel above 100
    breaks the last layer's input.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.query, self.value = nn.Linear(72, 16), nn.Linear(72, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        h = self.conv(x).flatten(1)[:, :72]
        h = torch.relu(self.query(h)) + self.value(h)
        return self.out(h * torch.nan if x.max() > 100 else h)


def batches(count, size=24, seed=0):
    """Return images in a fixed order."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]


def same(one, other):
    """Return whether two sets of projectors are equal to the bit."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].components, other[name].components)
        and torch.equal(one[name].energies, other[name].energies)
        and one[name].samples == other[name].samples
        for name in one
    )


def environment():
    """Return the environment of child processes: they import what is tested, with one thread."""
    paths = [str(ROOT), str(ROOT / "integrations"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def start(module, *arguments):
    """Start ``python -m tests.scale.<module>`` in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.scale.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill(process):
    """End a process and its children as the machine's failure would."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def until(condition, process, seconds=60):
    """Wait until something is so; fail if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended before: {process.communicate()}")
        if time.monotonic() > end:
            kill(process)
            raise AssertionError("it takes too long")
        time.sleep(0.005)
