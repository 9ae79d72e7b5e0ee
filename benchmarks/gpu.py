"""Tests and measurements on a GPU.

    python -m benchmarks.gpu [check] [measure] [study] [--blocks 8] [--study-seconds 450] [--quick]
        [--rehearse]

``check`` runs the tests of contract, devices and adapters with CuPy, torch on CUDA, and JAX, in at
most two minutes; ``measure`` compares learning and training with their floors and PEFT; ``study``
fine-tunes a language model by several methods at once, within ``--study-seconds``, from a bundle
that `benchmarks.gpu_bundle` writes. By default all run, in this order. The result of every step is
written as it comes, that of the study in parts. After a cut the same command goes on with the first
step that has not ended; delete the results file to begin anew. ``study --quick`` times steps of
random weights, eager and captured, and writes nothing. ``--rehearse`` runs all of it, tiny, on
whatever device there is, with NumPy for CuPy where there is no CUDA, and writes nothing.

It runs from a plain copy of the tree. Packages that the machine lacks travel as wheels beside it,
gathered where there is a package index:

    pip download --no-deps -d wheels array-api-compat array-api-strict hypothesis sortedcontainers \
        pytest pytest-xdist execnet iniconfig pluggy scipy safetensors peft transformers tqdm
    pip install --no-index --no-deps --find-links wheels array-api-compat array-api-strict
    PYTHONPATH=.:integrations python -m benchmarks.gpu

Install only those that cannot be imported, and leave the machine's torch, CuPy and JAX as they are.
"""

import argparse
import importlib
import importlib.util
import json
import tempfile
import time
import traceback
import warnings
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_check, gpu_study, gpu_timing, record
from benchmarks import gpu_measure as measure
from benchmarks.gpu_bundle import FOLDER, Plan

STAGES = ("check", "measure", "study")
PACKAGES = ["ipa-projectors", "array-api-compat", "jax", "peft", "torch", "transformers"]


class Results:
    """Results by step, each written as it comes and found again by the next run."""

    def __init__(self, quick: bool, written: bool) -> None:
        self._quick, self._written = quick, written
        self.broken: list[str] = []
        self.values: dict[str, Any] = {"device": device()}
        path = record.path_of("gpu", quick)
        if written and path.is_file():
            before = json.loads(path.read_text())
            if before["device"]["name"] != self.values["device"]["name"]:
                raise SystemExit(
                    f"expected results of {self.values['device']['name']} in {path}, got those of "
                    f"{before['device']['name']}; move the file away to begin anew"
                )
            self.values = before

    def add(self, name: str, step: measure.Step) -> None:
        """Take a step, unless its result is known, and write what it returns."""
        ended = self.values.setdefault("ended", {})
        if name in ended:
            print(f"{name}: has its result of {ended[name]}", flush=True)
            return
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            self.values[name] = step(self.values)
        except Exception:  # a lent device is too dear to stop at one fault
            self.broken.append(name)
            traceback.print_exc()
            return
        ended[name] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        print(f"{name} ({time.perf_counter() - start:.0f} s)", self.values[name], flush=True)
        self.keep(name, self.values[name])

    def keep(self, name: str, value: Any) -> None:
        """Write what is known of a step, which has ended or goes on."""
        self.values[name] = value
        if self._written:
            record.write("gpu", self._quick, PACKAGES, self.values)


def device() -> dict[str, Any]:
    """Return name, memory and versions of the device and its libraries."""
    arrays = measure.ARRAYS
    found: dict[str, Any] = {"name": measure.DEVICE}
    if importlib.util.find_spec(arrays):  # its distribution has other names than the module
        found[arrays] = importlib.import_module(arrays).__version__
    if measure.DEVICE == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"name": torch.cuda.get_device_name(), "bytes": total, "free_bytes": free}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def study(args: argparse.Namespace, results: Results, scratch: Path) -> dict[str, measure.Step]:
    """Return the step of stage ``study``, which keeps its parts in the results."""
    keep, limit = partial(results.keep, "study"), args.study_seconds
    if args.quick:
        return {"study": lambda _: gpu_timing.run(args.rehearse)}
    if args.rehearse:
        return {"study": lambda _: gpu_study.rehearse(scratch, limit, keep)}
    return {"study": lambda _: gpu_study.run(Plan(), args.bundle, limit, keep)}


def main() -> int:
    """Run the stages; the exit status is the number of steps that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "stages", nargs="*", metavar="stage", help="check, measure, study; all by default"
    )
    parser.add_argument("--blocks", type=int, help="of LLaMA-3-8B's 32; by default 8")
    parser.add_argument("--study-seconds", type=float, default=gpu_study.LIMIT, metavar="SECONDS")
    parser.add_argument("--bundle", type=Path, default=FOLDER, help="folder of the study's bundle")
    parser.add_argument("--quick", action="store_true", help="two blocks; of the study 20 steps")
    parser.add_argument("--rehearse", action="store_true", help="tiny, anywhere, nothing written")
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"expected the stages {STAGES}, got {', '.join(sorted(unknown))}")
    if measure.DEVICE != "cuda" and not args.rehearse:
        raise SystemExit("expected a CUDA device, got none; --rehearse runs without one")
    warnings.simplefilter("ignore")
    timing_only = args.quick and args.stages == ["study"]
    results = Results(args.quick, written=not (args.rehearse or timing_only))
    with tempfile.TemporaryDirectory() as scratch:
        steps = {
            "check": gpu_check.steps(measure.DEVICE, args.rehearse),
            "measure": measure.steps(args.rehearse, 2 if args.quick else args.blocks),
            "study": study(args, results, Path(scratch)),
        }
        for stage in STAGES:
            if stage in (args.stages or STAGES):
                for name, step in steps[stage].items():
                    results.add(name, step)
    return gpu_check.failures(results.values, args.rehearse) + len(results.broken)


if __name__ == "__main__":
    raise SystemExit(main())
