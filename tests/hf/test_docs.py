"""The guide's code runs, and its tables name existing tests."""

import re
from itertools import takewhile
from pathlib import Path

import pytest

from . import test_families
from .families import FAMILIES

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = DOCS / "peft.md"


@pytest.mark.parametrize("page", ["peft.md", "moe.md"])
def test_code_runs(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 1
    exec("\n".join(blocks), {"__name__": "guide"})


def test_table_is_true():
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("| family"))
    named = re.findall(r"`(\w+)`", lines[head])
    assert named and all(callable(getattr(test_families, name)) for name in named)
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines[head + 2 :][: len(FAMILIES)]]
    assert [row[0] for row in rows] == list(FAMILIES)
    assert all(set(row[1:]) == {f"`[{row[0]}]`"} for row in rows)


def test_features_name_tests_that_exist():
    text = GUIDE.read_text(encoding="utf-8")
    after = text[text.index("| feature | test |") :].splitlines()[2:]
    rows = [line for line in after if line.startswith("|")]
    assert len(rows) > 15
    for row in rows:
        file = None
        for name in re.findall(r"`(test_\w+(?:\.py)?)`", row):
            if name.endswith(".py"):
                file = (Path(__file__).parent / name).read_text(encoding="utf-8")
            else:
                assert file is not None and f"def {name}(" in file, name
        assert file is not None, row


def test_server_and_trainer_tables_have_no_empty_cell():
    """Each cell names tests that exist, or says that rules are applied, or why it is not run."""
    known = "\n".join(
        path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py")
    )
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    for head in ("| feature | llama.cpp |", "| trainer | the documented line, A afterwards"):
        start = next(number for number, line in enumerate(lines) if line.startswith(head))
        rows = list(takewhile(lambda line: line.startswith("|"), lines[start + 2 :]))
        assert len(rows) >= 8
        for cell in (cell for row in rows for cell in row.strip("| ").split(" | ")[1:]):
            names = re.findall(r"`(test_\w+)[`\[]", cell)
            assert all(f"def {name}(" in known for name in names), cell
            assert names or cell.startswith(("rules applied", "not run, because", "the same")), cell
