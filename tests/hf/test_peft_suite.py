"""PEFT's tests of custom models, run on initialized models; see CONTRIBUTING.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest

SOURCE = os.environ.get("IPA_PEFT_SOURCE")


@pytest.mark.slow
@pytest.mark.skipif(not SOURCE, reason="IPA_PEFT_SOURCE names no copy of PEFT's source")
def test_saving_loading_merging_mixing_disabling_and_deleting(tmp_path):
    version = (Path(SOURCE) / "src" / "peft" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{peft.__version__}"' in version, (
        "IPA_PEFT_SOURCE is not the source of the installed PEFT"
    )
    settings = tmp_path / "pytest.ini"
    settings.write_text("[pytest]\n", encoding="utf-8")
    options = ["-p", "peft_plugin", "-p", "no:cacheprovider", "--import-mode=importlib", "-q"]
    command = [sys.executable, "-m", "pytest", "-c", settings, "--rootdir", SOURCE, *options]
    paths = [str(Path(__file__).parent), *(str(path) for path in sys.path if path)]
    done = subprocess.run(
        [*map(str, command), "tests/test_custom_models.py"],
        cwd=SOURCE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    (prepared,) = re.findall(r"passed on models prepared by ipa_hf: (\d+)", done.stdout)
    assert int(prepared) >= 590
