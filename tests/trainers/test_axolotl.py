"""axolotl and unsloth continue the documented adapter, in an environment of their own."""

import os
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("IPA_AXOLOTL", ROOT / ".venv" / "axolotl"))

pytestmark = pytest.mark.skipif(
    not ENVIRONMENT.exists(), reason=f"no {ENVIRONMENT}: make test-trainers installs it"
)

SETTINGS = """
base_model: MODEL
adapter: lora
lora_model_dir: adapter
datasets:
  - path: texts.jsonl
    ds_type: json
    type: completion
output_dir: saved-by-axolotl
sequence_len: 64
max_steps: 4
micro_batch_size: 2
gradient_accumulation_steps: 1
learning_rate: 1.0e-2
lr_scheduler: constant
optimizer: adamw_torch
val_set_size: 0
"""


def execute(program, *arguments, folder, **variables):
    """Run a program of the environment in a folder; return the versions of its packages."""
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    done = subprocess.run(
        [ENVIRONMENT / "bin" / program, *arguments],
        cwd=folder,
        env=os.environ | settings | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    (packages,) = ENVIRONMENT.glob("lib/*/site-packages")
    return {found.name: found.version for found in distributions(path=[str(packages)])}


def test_axolotl_continues_the_adapter(task):
    (task.folder / "axolotl.yaml").write_text(SETTINGS)
    command = ["axolotl", "train", "axolotl.yaml", "--launcher", "python"]
    path = f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ['PATH']}"
    versions = execute(*command, folder=task.folder, PATH=path, PYTHONPATH="")
    saved = task.folder / "saved-by-axolotl"
    # It loads the adapter itself, and so trains A too.
    task.check("axolotl", "lora_model_dir", versions["axolotl"], saved, frozen=False)


def test_unsloth_holds_A_after_freezing(task, tmp_path):
    script = Path(__file__).parent / "run_unsloth.py"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "integrations")])
    saved = tmp_path / "saved"
    versions = execute("python", script, "adapter", saved, folder=task.folder, PYTHONPATH=paths)
    case = "FastLanguageModel, freeze_projections"
    task.check("unsloth", case, versions["unsloth"], saved)
