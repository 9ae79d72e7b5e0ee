"""The guide's code runs, and the table lists every family of timm."""

import re
from pathlib import Path

import pytest

timm = pytest.importorskip("timm", reason="needs timm on the path: make test-timm")

from timm.models import list_modules

from tests.test_documents import bare_names

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "timm.md").read_text(encoding="utf-8")


def test_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) > 1
    exec("\n".join(blocks), {"__name__": "guide"})


def test_table_of_families_is_of_this_timm():
    table = (ROOT / "benchmarks" / "results" / "timm_families.md").read_text(encoding="utf-8")
    assert table.startswith(f"timm {timm.__version__}: ")
    assert set(re.findall(r"^\| (\w+) \| `", table, re.MULTILINE)) == set(list_modules())


def test_public_names_have_docstring_example_and_types():
    assert not bare_names("ipa_timm")
