"""Child processes of the tests: their model and batches, start, and kill -9."""

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
    """Two layers with a shared input, and a convolution; a pixel above 100 gives NaN at the end."""

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


def same(first, second):
    """Return whether two sets of projectors are equal to the bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name].components, second[name].components)
        and torch.equal(first[name].energies, second[name].energies)
        and first[name].samples == second[name].samples
        for name in first
    )


def environment():
    """Return the environment of child processes: this checkout, with one thread."""
    paths = [str(ROOT), str(ROOT / "integrations"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def start(module, *arguments):
    """Start ``python -m tests.scale.<module>`` in a new process group."""
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
    """Kill a process and its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def until(condition, process, seconds=60):
    """Wait until a condition holds; fail if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended before: {process.communicate()}")
        if time.monotonic() > end:
            kill(process)
            raise AssertionError(f"expected the condition within {seconds} seconds")
        time.sleep(0.005)
