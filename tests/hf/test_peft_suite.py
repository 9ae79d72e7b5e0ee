"""PEFT's tests of custom models and of EVA, run on initialized models; see CONTRIBUTING.md."""

import os
import re
import sys
from pathlib import Path

import peft
import pytest

from tests import child_process

SOURCE = os.environ.get("IPA_PEFT_SOURCE")


@pytest.fixture
def run_peft_tests(tmp_path):
    """Return a function that runs tests of PEFT's source under a plugin and returns the report."""
    if not SOURCE:
        pytest.skip("IPA_PEFT_SOURCE names no copy of PEFT's source")
    version = (Path(SOURCE) / "src" / "peft" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{peft.__version__}"' in version, (
        "IPA_PEFT_SOURCE is not the source of the installed PEFT"
    )
    settings = tmp_path / "pytest.ini"
    settings.write_text("[pytest]\n", encoding="utf-8")

    def run(plugin, tests):
        options = ["-p", plugin, "-p", "no:cacheprovider", "--import-mode=importlib", "-q"]
        command = [sys.executable, "-m", "pytest", "-c", settings, "--rootdir", SOURCE, *options]
        paths = [str(Path(__file__).parent), *(str(path) for path in sys.path if path)]
        done = child_process.run(
            [*map(str, command), tests],
            seconds=1800,
            cwd=SOURCE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout

    return run


@pytest.mark.slow
def test_saving_loading_merging_mixing_disabling_and_deleting(run_peft_tests):
    report = run_peft_tests("peft_plugin", "tests/test_custom_models.py")
    (prepared,) = re.findall(r"passed on models prepared by ipa_hf: (\d+)", report)
    assert int(prepared) >= 590


@pytest.mark.slow
def test_eva(run_peft_tests):
    report = run_peft_tests(
        "peft_eva_plugin", "tests/test_gpu_examples.py::TestEvaInitializationGPU"
    )
    (passed,) = re.findall(r"(\d+) passed", report)
    assert int(passed) >= 12
