"""Fine-tune on sets in the layout of VTAB-1k: python -m benchmarks.vtab DATA.

A cell of the table, a method on a set, is written when it is done; what is there is not done again.
"""

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import benchmarks.vision  # noqa: F401  isort: skip  (before timm)
import torch

from benchmarks.vtab import models, sets, table
from benchmarks.vtab.methods import METHODS
from benchmarks.vtab.training import Cell, Settings

RESULTS = Path(__file__).parents[1] / "results" / "vtab"
QUICK = Settings(epochs=1, rates=(1e-2,), seeds=(0,))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("data", type=Path, help="folder with a folder for each set")
    parser.add_argument("--backbone", default="saliency-vit-s", help="with adapters in it")
    parser.add_argument("--weights", type=Path, help="file, where the backbone is a name in timm")
    parser.add_argument("--text", type=Path, help="SigLIP folder, for a zero-shot head")
    parser.add_argument("--sets", nargs="+", help="by default all that are in the folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write")
    parser.add_argument("--quick", action="store_true", help="one short training a cell")
    chosen = parser.parse_args(arguments)

    names = chosen.sets or sets.present(chosen.data)
    if missing := sets.absent(chosen.data):
        print(f"absent from {chosen.data}: {', '.join(missing)}")
    backbone = models.backbone(chosen.backbone, chosen.weights, chosen.text)
    for name in names:
        run(name, chosen, backbone, QUICK if chosen.quick else Settings())
    print(f"written to {table.write(chosen.results)}")
    return 0


def run(
    name: str, chosen: argparse.Namespace, backbone: models.Backbone, settings: Settings
) -> None:
    """Fill the cells of one set that are empty."""
    folder = chosen.results / chosen.backbone / name
    empty = [m for m in chosen.methods if not (folder / f"{table.slug(m)}.json").is_file()]
    if not empty:
        return
    torch.manual_seed(0)
    data = sets.read(chosen.data, name)
    cell = Cell(backbone, backbone.make(data), data, settings)
    for method in empty:
        began = time.perf_counter()
        result = cell.result(method)
        result |= {
            "backbone": chosen.backbone,
            "head": "zero-shot" if chosen.text else "linear",
            "pixels": backbone.pixels,
            "first_block": backbone.first,
            "seconds": round(time.perf_counter() - began),
            "threads": torch.get_num_threads(),
            "versions": {one: version(one) for one in ("torch", "timm", "peft")},
        }
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f"{table.slug(method)}.{os.getpid()}"
        scratch.write_text(json.dumps(result, indent=1) + "\n")
        scratch.rename(folder / f"{table.slug(method)}.json")
        table.write(chosen.results)
        tests = [f"{100 * one['test']:.1f}" for one in result["runs"]]
        print(f"{name}, {method}: {', '.join(tests)} % ({result['seconds']} s)", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
