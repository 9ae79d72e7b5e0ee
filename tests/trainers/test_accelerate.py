"""accelerate trains the documented model in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import accelerate


def test_two_processes(task, tmp_path):
    script = Path(__file__).parent / "run_accelerate.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script]
    files = [task.folder / "MODEL", task.adapter, tmp_path / "saved"]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "integrations")])
    done = subprocess.run(
        [str(x) for x in [*command, *files]],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    version = accelerate.__version__
    task.check("accelerate", "two processes", version, tmp_path / "saved")
