"""The documentation holds: examples run, no page is a dead end, no name is bare.

The Python of the bridges' pages is executed by the bridges' own tests; that of the tutorials when
the site is built; commands by `test_commands.py`.
"""

import importlib
import inspect
import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

from ipa_core import IPAError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Lists of everything, and the page that leads everywhere.
ENDS = {"changelog.md", "index.md", "reference.md"}


def examples(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    "page", ["docs/activations.md", "docs/learners.md", "docs/migrating.md", "docs/moments.md"]
)
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    blocks = examples(page)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "page"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("number", range(3))
def test_each_example_of_the_readme_runs_by_itself(number):
    pytest.importorskip("peft")
    exec(compile(examples("README.md")[number], "README.md", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ENDS], ids=lambda p: p.name)
def test_page_has_a_next_step(page):
    last = page.read_text(encoding="utf-8").rstrip().rpartition("\n\n")[2]
    assert last.startswith("Next: ") and "](" in last


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_page_is_in_the_navigation(page):
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f" {page.relative_to(DOCS).as_posix()}\n" in navigation


def errors(base):
    return [base, *(error for own in base.__subclasses__() for error in errors(own))]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/peft.md",
        "docs/questions.md",
        "docs/torch.md",
        "integrations/ipa_hf/__main__.py",
    ],
)
def test_pages_give_the_same_learning_rates(page):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").replace('"', "").split())
    found = re.findall(r"With A frozen, start at (.{0,120}?) for other models", text)
    factors = [re.findall(r"(\w+) times", sentence) for sentence in found]
    assert factors == [["ten", "three"]]
    assert all("causal language model" in sentence for sentence in found)


def test_errors_name_a_page_that_exists():
    pytest.importorskip("torch")
    importlib.import_module("ipa_torch")
    for error in errors(IPAError):
        (note,) = error("expected this, got that").__notes__
        assert note.endswith(error.page)
        page, _, place = error.page.partition("#")
        text = (ROOT / page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        assert not place or place in {
            re.sub(r"\W+", "-", h.lower()).strip("-") for h in headings
        }, error


def bare_names(package):
    """Return the public names of a package that lack a docstring, an example or types."""
    module = importlib.import_module(package)
    bare = []
    for name in module.__all__:
        thing = getattr(module, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        text = inspect.getdoc(thing) or ""
        error = inspect.isclass(thing) and issubclass(thing, BaseException)
        typed = True
        if inspect.isfunction(thing):
            signature = inspect.signature(thing)
            hints = [p.annotation for p in signature.parameters.values()]
            typed = signature.empty not in [*hints, signature.return_annotation]
        if not text or not typed or not (error or ">>>" in text):
            bare.append(name)
    return bare


@pytest.mark.parametrize("package", ["ipa_core", "ipa_torch", "ipa_hf"])  # ipa_timm: tests/timm
def test_public_names_have_docstring_example_and_types(package):
    if package == "ipa_hf":
        pytest.importorskip("peft")
    assert not bare_names(package)


def test_formulas_of_pages_and_docstrings_are_drawn():
    pytest.importorskip("latex2mathml")
    hook = runpy.run_path(str(DOCS / "hooks" / "mathml.py"))["on_page_content"]
    for source in (
        r'<div class="arithmatex">\[x_i &lt; 1\]</div>',
        r'<span class="arithmatex">\(x_i &lt; 1\)</span>',
        r"<p>.. math:: x_i &lt; 1</p>",
        r"<p>It is :math:<code>x_i &lt; 1</code>.</p>",
    ):
        drawn = hook(source)
        assert drawn.count("<math") == 1 and "<msub>" in drawn and "math:" not in drawn


PUBLIC = runpy.run_path(str(DOCS / "hooks" / "public_names.py")) if find_spec("griffe") else {}


@pytest.mark.parametrize("package", ["ipa_core", "ipa_torch", "ipa_hf"])
def test_reference_lists_every_public_name(package):
    pytest.importorskip("griffe")
    listed = PUBLIC["public_names"]()[package]
    module = importlib.import_module(package)
    assert set(listed) == set(module.__all__)
    for name, line in listed.items():
        assert inspect.getdoc(getattr(module, name)).startswith(line.split("`")[0].split("$")[0])


def test_reference_page_holds_the_tables():
    pytest.importorskip("griffe")
    page = PUBLIC["on_page_markdown"]((DOCS / "reference.md").read_text(encoding="utf-8"))
    for module, lines in PUBLIC["public_names"]().items():
        assert f"### {module}\n" in page and f"::: {module}\n" in page
        assert lines and all(f"(#{module}.{name})" in page for name in lines)
