"""Repeat a training run of the vision table and compare it with the committed value.

    python -m benchmarks.evidence.quick_vision

In a process of its own, as timm and torchvision stay out of the others.
"""

import json
import tempfile
from pathlib import Path

import benchmarks.vision  # noqa: F401  isort: skip  (before timm)
import torch

from benchmarks.evidence.agreement import agrees
from benchmarks.vtab import make_sets, models, sets
from benchmarks.vtab.__main__ import RESULTS
from benchmarks.vtab.training import Cell, Settings

SET, BACKBONE, METHOD = "digits", "saliency-vit-s", "ipa-frozen"


def main() -> int:
    path = RESULTS / BACKBONE / SET / f"{METHOD}.json"
    committed = json.loads(path.read_text(encoding="utf-8"))
    run = committed["runs"][0]
    once = {"rates": (run["rate"],), "seeds": (run["seed"],)}
    settings = Settings(**committed["settings"] | once)
    with tempfile.TemporaryDirectory() as folder:
        make_sets.write(Path(folder) / SET, make_sets.SETS[SET]())
        data = sets.read(Path(folder), SET)
        torch.manual_seed(0)  # as the runner does for each set
        backbone = models.backbone(BACKBONE, None, None)
        result = Cell(backbone, backbone.make(data), data, settings).result(committed["method"])
    found = result["runs"][0]["test"]
    name = f"{SET}, {committed['method']}"
    return int(not agrees(name, found, run["test"], committed["test_images"]))


if __name__ == "__main__":
    raise SystemExit(main())
