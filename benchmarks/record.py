"""Results files: what was measured, where, with which versions, when, by which command."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def write(name: str, quick: bool, packages: list[str], results: dict[str, Any]) -> Path:
    """Write results beside their circumstances; a quick run leaves full results alone."""
    command = f"python -m benchmarks.{name}{' --quick' if quick else ''}"
    content = circumstances(command, packages) | results
    FOLDER.mkdir(exist_ok=True)
    path = path_of(name, quick)
    unfinished = path.with_suffix(".tmp")  # a cut leaves the results before it whole
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)
    print(f"written to {path}")
    return path


def path_of(name: str, quick: bool) -> Path:
    """Return the results file of a benchmark."""
    return FOLDER / f"{name}{'_quick' if quick else ''}.json"


def circumstances(command: str, packages: list[str]) -> dict[str, Any]:
    """Return the command, the date, the machine and the versions."""
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "load_at_the_end": round(os.getloadavg()[0], 1),
        },
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in packages},
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
