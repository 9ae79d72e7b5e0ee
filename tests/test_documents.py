"""The documentation holds: examples run, commands exist, no page is a dead end, no name is bare.

The Python of the bridges' pages is executed by the bridges' own tests; that of the tutorials when
the site is built.
"""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Lists of everything, and the page that leads everywhere.
ENDS = {"changelog.md", "index.md", "reference.md"}


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/activations.md", "docs/learners.md", "docs/migrating.md"],
)
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "page"})
    assert capsys.readouterr().out


def commands():
    """Return every ``python -m ...`` and ``make ...`` of the pages, cut where prose goes on."""
    found = set()
    for page in [ROOT / "README.md", *PAGES]:
        text = page.read_text(encoding="utf-8")
        found |= set(re.findall(r"(?:^ {4}|`)((?:python -m|make) [^`\n#]+)", text, re.MULTILINE))
    return sorted(command.strip() for command in found)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m")])
def test_command_exists_with_its_options(command):
    _, _, module, *rest = command.split()
    if module.startswith("benchmarks"):
        source = importlib.util.find_spec(module)
        assert source is not None and source.origin is not None, module
        known = Path(source.origin).read_text(encoding="utf-8")
    else:
        pytest.importorskip("peft")
        words = [word for word in rest[:1] if word.isalpha()]
        asked = [sys.executable, "-m", module, *words, "--help"]
        known = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    for option in re.findall(r"--[a-z-]+", command):
        assert option in known, f"{module} has no {option}"


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make")])
def test_target_exists(command):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    target = command.split()[1]
    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ENDS], ids=lambda p: p.name)
def test_page_has_a_next_step(page):
    last = page.read_text(encoding="utf-8").rstrip().rpartition("\n\n")[2]
    assert last.startswith("Next: ") and "](" in last


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_page_is_in_the_navigation(page):
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f" {page.relative_to(DOCS).as_posix()}\n" in navigation


@pytest.mark.parametrize("package", ["ipa_core", "ipa_torch", "ipa_hf"])
def test_public_names_have_docstring_example_and_types(package):
    if package == "ipa_hf":
        pytest.importorskip("peft")
    module = importlib.import_module(package)
    bare = []
    for name in module.__all__:
        thing = getattr(module, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        if inspect.isclass(thing) and issubclass(thing, BaseException):
            assert inspect.getdoc(thing), name
            continue
        if ">>>" not in (inspect.getdoc(thing) or ""):
            bare.append(name)
        if inspect.isfunction(thing):
            hints = inspect.signature(thing)
            untyped = [p for p in hints.parameters.values() if p.annotation is p.empty]
            assert not untyped and hints.return_annotation is not hints.empty, name
    assert not bare
