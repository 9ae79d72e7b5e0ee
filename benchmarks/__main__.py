"""Run all benchmarks, one process each: python -m benchmarks [--quick]."""

import subprocess
import sys

SUITE = ["learners", "torch_learning", "torch_training"]


def main() -> int:
    """Run the suite; the exit status is the number of benchmarks that failed."""
    failed = 0
    for name in SUITE:
        print(f"\n## {name}\n", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]
        failed += subprocess.run(command, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
