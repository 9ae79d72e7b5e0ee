"""Initialization in several processes, each with a shard of the data."""

import os
import sys
from pathlib import Path

import pytest
import torch

from tests import child_process

from .models import text_batches
from .processes_run import learned

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_rank_has_the_result_of_all_data(tmp_path):
    paths = [str(ROOT), str(ROOT / "integrations"), os.environ.get("PYTHONPATH", "")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = child_process.run(
        [sys.executable, *launcher, "-m", "tests.hf.processes_run", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    expected = learned(text_batches())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(expected) == 10
    for name, a in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], a, atol=1e-4, rtol=1e-3)
