"""Environments of servers, and adapters that were trained once for all of them.

Servers run in environments of their own, below the folder of ``make test-serving``, as programs
(``run_*.py``) that read a request and write answers, both as JSON.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.results_file import ResultsFile, results_fixture

from . import served_models
from .served_models import difference

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = Path(os.environ.get("IPA_SERVING", ROOT / ".venv" / "serving"))
HEADER = ["server", "case", "version", "log-probabilities, largest difference", "greedy text"]
QUIET = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "PYTHONWARNINGS": "ignore"}


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.assets)
            item.add_marker(pytest.mark.slow)
            # Warnings of the packages that are called, not of this one.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


def installed(name: str) -> Path:
    """Return what ``make test-serving`` installed; skip the test if it is not there."""
    found = sorted(ENVIRONMENTS.glob(name))
    if not found:
        pytest.skip(f"no {name} in {ENVIRONMENTS}: make test-serving installs it")
    return found[-1]


@pytest.fixture(scope="session")
def llama_cpp():
    return installed("llama_cpp")


@pytest.fixture(scope="session")
def vllm():
    return installed("vllm/bin/python")


@pytest.fixture(scope="session")
def sglang():
    return installed("sglang-*.whl")


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    if not ENVIRONMENTS.exists():  # training would be for nothing
        pytest.skip(f"no {ENVIRONMENTS}: make test-serving installs the servers")
    pytest.importorskip("gguf", reason="the weights of SmolLM2 come as GGUF")
    return served_models.make(tmp_path_factory.mktemp("served"))


class Results(ResultsFile):
    """Differences of servers' answers from those of transformers with PEFT."""

    def compare(self, server, name, answers, served, most=1e-3):
        """Record the differences, and fail if they are larger than float32 explains."""
        found, expected = answers[name], served.expected[name]
        distance = difference(found, expected)
        same = [x["tokens"] for x in found] == [x["tokens"] for x in expected]
        text = "equal" if same else "differs"
        self.add(server, name, answers["version"], f"{distance:.1e}", text)
        assert distance < most and same
        if name != "base":  # else nothing is shown
            assert difference(expected, served.expected["base"]) > 0.5


results = results_fixture(Results("serving", "make test-serving", HEADER))


@pytest.fixture(scope="session")
def answer(tmp_path_factory):
    """Return a function that runs a server's program on a request and returns its answers."""

    def run(python: Path, program: str, request: dict, *arguments: Path) -> dict:
        folder = tmp_path_factory.mktemp(program)
        files = folder / "request.json", folder / "answers.json"
        files[0].write_text(json.dumps(request))
        source = Path(__file__).parent / program
        return_code, said = execute([python, source, *arguments, *files])
        assert return_code == 0, said
        return json.loads(files[1].read_text())

    return run


def execute(command: list) -> tuple[int, str]:
    """Return exit status and the end of the output of a command, without our packages."""
    done = subprocess.run(
        [str(x) for x in command],
        env=os.environ | QUIET,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    return done.returncode, done.stdout[-5000:]
