"""The guide's code runs, from its beginning to its end."""

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "torch.md"


def test_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    exec(compile("\n".join(blocks), str(GUIDE), "exec"), {"__name__": "guide"})


def test_every_test_that_it_names_exists():
    text = GUIDE.read_text()
    here = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named
    assert all(f"def {name}(" in here for name in named)
