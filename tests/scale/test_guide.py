"""The guide's code runs, from its beginning to its end."""

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_guide_runs(capsys):
    pytest.importorskip("dask")
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    exec(compile("\n".join(blocks), str(GUIDE), "exec"), {"__name__": "guide"})
    assert "ActivationStore(2 layers, 640 rows a layer" in capsys.readouterr().out
