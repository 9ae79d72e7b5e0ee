"""Run all benchmarks, one process each, and print one table: python -m benchmarks [--quick]."""

import importlib.util
import subprocess
import sys

SUITE = [
    "learners",
    "peers",
    "peers_sklearn",
    "growth",
    "busy_machine",
    "torch_learning",
    "torch_peers",
    "torch_training",
    "export",
    "shared_projection",
    "short_streams",
]


def main() -> int:
    """Run the suite; the exit status is the number of benchmarks that failed."""
    failed = sum(not run(name, *sys.argv[1:]) for name in SUITE)
    if not has_gpu():
        print("\n## gpu\n\nnot measured: no CUDA device", flush=True)
    else:
        failed += not run("gpu", *sys.argv[1:])
    run("summary", *sys.argv[1:])
    return failed


def run(name: str, *options: str) -> bool:
    """Run one benchmark; return whether it succeeded."""
    print(f"\n## {name}\n", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    return subprocess.run(command, check=False).returncode == 0


def has_gpu() -> bool:
    """Return whether torch finds a CUDA device."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
