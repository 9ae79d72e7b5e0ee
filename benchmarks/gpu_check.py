"""Stage ``check`` of `benchmarks.gpu`: the tests of contract, devices and adapters on a device.

Every step is a run of pytest in a process of its own, with a time limit. All start together: a
device has hardly work from tests, and its time is short. A step that reaches its limit is
interrupted and tells of the tests that ended.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
#: Seconds of a step, and those that an interrupted run may take to write its report.
LIMIT, GRACE = 110, 10
#: Processes of all steps together.
PROCESSES = 20
#: One law, about the origin, of the default learner.
REHEARSED = "(law_weights and RandomizedSVD and origin) or test_merge"


class Tests(NamedTuple):
    """Tests of a step, the expression that selects them, and the limit in seconds."""

    files: tuple[str, ...]
    selected: str
    limit: int


CONTRACT = ("tests/core/test_contract.py",)
#: Tests that start processes or compilers say nothing about a device.
ADAPTERS = "not kill and not ranks and not compiled"
STEPS = {
    "check cupy": Tests(CONTRACT, "cupy", LIMIT),
    "check torch": Tests(CONTRACT, "torch", LIMIT),
    "check adapters": Tests(
        (
            "tests/torch/test_async_devices.py",
            "tests/torch/test_matmul_view.py",
            "tests/torch/test_learners.py",
            "tests/torch/test_adapters.py",
        ),
        ADAPTERS,
        LIMIT,
    ),
    # JAX compiles every operation for every shape: the default learner only.
    "check jax": Tests(CONTRACT, "jax and RandomizedSVD", LIMIT),
}


def steps(device: str, tiny: bool) -> dict[str, Any]:
    """Return the steps in their order, for torch tensors on ``device``."""
    running: dict[str, Future[dict[str, Any]]] = {}

    def result(step: str, results: Mapping[str, Any]) -> dict[str, Any]:
        if not running:
            left = [name for name in STEPS if name not in results.get("ended", {})]
            pool = ThreadPoolExecutor(len(left))
            running.update((name, pool.submit(_run, STEPS[name], device, tiny)) for name in left)
        return running[step].result()

    return {step: partial(result, step) for step in STEPS}


def failures(results: Mapping[str, Any], tiny: bool) -> int:
    """Return the steps that failed or were interrupted; unless tiny, those without a pass, too."""
    found = [value for name, value in results.items() if name.startswith("check ")]
    return sum(
        bool(each["failed"] or each["interrupted"] or not (tiny or each["passed"]))
        for each in found
    )


def _run(tests: Tests, device: str, tiny: bool) -> dict[str, Any]:
    selected = f"({tests.selected}) and ({REHEARSED})" if tiny else tests.selected
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *tests.files, "-k", selected, "-q", "--tb=short"]
        # The device's machine has plugins and releases of its own: their warnings are no failures.
        command += [f"--junit-xml={report}", f"--torch-device={device}", "-o", "filterwarnings="]
        command += ["-p", "no:cacheprovider"]
        command += ["-p", "_hypothesis_pytestplugin", "--hypothesis-profile=jax", *_workers(tiny)]
        output, interrupted = _limited(command, tests.limit)
        counted = summarize(report.read_text()) if report.is_file() else summarize("<none/>")
    nothing = not counted["passed"] and not counted["skipped"]
    if nothing:  # pytest itself failed, or did not answer
        counted["failed"] = counted["failed"] or 1
        counted["first_of_each_kind"].setdefault("pytest", output[-2000:])
    return counted | {"interrupted": interrupted}


def _workers(tiny: bool) -> list[str]:
    """Return options for several processes where pytest-xdist is installed."""
    if tiny or importlib.util.find_spec("xdist") is None:
        return []
    return [
        "-p",
        "xdist.plugin",
        "-n",
        str(max(1, min(PROCESSES, os.cpu_count() or 1) // len(STEPS))),
    ]


def _limited(command: list[str], limit: int) -> tuple[str, bool]:
    """Return the output of a command and whether it was interrupted at its limit."""
    paths = [str(ROOT), str(ROOT / "integrations"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the device
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=limit)[0], False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=GRACE)[0], True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0], True


def summarize(report: str) -> dict[str, Any]:
    """Return counts, and the first failure of each kind, of a report in JUnit's format."""
    passed, failed = 0, 0
    skipped: Counter[str] = Counter()
    first: dict[str, str] = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        fault = next((part for part in case if part.tag in ("failure", "error")), None)
        omitted = case.find("skipped")
        if fault is not None:
            failed += 1
            message = fault.get("message", "")
            kind = message.partition(":")[0].splitlines()[0] if message else "unknown"
            test = f"{case.get('classname')}::{case.get('name')}"
            first.setdefault(kind, f"{test}\n{(fault.text or '')[-2000:]}")
        elif omitted is not None:
            skipped[omitted.get("message", "")] += 1
        else:
            passed += 1
    return {
        "passed": passed,
        "failed": failed,
        "skipped": dict(skipped),
        "first_of_each_kind": first,
    }
