"""Where the torch benchmarks write what they measured, and on what."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


def write(name: str, quick: bool, results: dict[str, Any]) -> None:
    """Write results with machine, versions and date; a quick run leaves full results alone."""
    content = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_at_the_end": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "peft", "ipa-projectors")},
        **results,
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}{'_quick' if quick else ''}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written to {path}")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc") else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
