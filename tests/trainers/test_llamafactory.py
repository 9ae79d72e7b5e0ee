"""LLaMA-Factory continues the documented adapter by its command, in an environment of its own."""

import json
import os
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("IPA_LLAMAFACTORY", ROOT / ".venv" / "llamafactory"))

pytestmark = pytest.mark.skipif(
    not ENVIRONMENT.exists(), reason=f"no {ENVIRONMENT}: make test-trainers installs it"
)

SETTINGS = """
model_name_or_path: MODEL
adapter_name_or_path: adapter
stage: sft
do_train: true
finetuning_type: lora
dataset: texts
dataset_dir: .
template: empty
cutoff_len: 64
output_dir: saved
max_steps: 4
per_device_train_batch_size: 2
learning_rate: 1.0e-2
report_to: none
use_cpu: true
"""


def test_continues_the_adapter(task):
    rows = [{"instruction": "a b c", "input": "", "output": "d e f"}] * 16
    (task.folder / "rows.json").write_text(json.dumps(rows))
    (task.folder / "dataset_info.json").write_text('{"texts": {"file_name": "rows.json"}}')
    (task.folder / "train.yaml").write_text(SETTINGS)
    # It imports torchaudio for sound; the index has builds of that for GPUs only.
    (task.folder / "empty").mkdir()
    (task.folder / "empty" / "torchaudio.py").touch()
    settings = {"PYTHONPATH": "empty", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [ENVIRONMENT / "bin" / "llamafactory-cli", "train", "train.yaml"],
        cwd=task.folder,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    (version,) = (
        found.version
        for found in distributions(path=[str(next(ENVIRONMENT.glob("lib/*/site-packages")))])
        if found.name == "llamafactory"
    )
    saved = task.folder / "saved"
    # It loads the adapter itself, and so trains A too.
    task.check("LLaMA-Factory", "adapter_name_or_path", version, saved, frozen=False)
