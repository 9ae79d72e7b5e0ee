"""Code and documentation use the terms of the field and American spelling."""

from pathlib import Path

import pytest

from .language import check

ROOT = Path(__file__).parents[1]
FOLDERS = ("ipa_core", "integrations", "benchmarks", "docs", "tests")
#: The rules, and the list of old names.
EXCLUDED = {"tests/language.py", "tests/test_language.py", "CHANGELOG.md"}
#: Generated tables.
EXCLUDED_FOLDERS = ("benchmarks/results",)


def sources():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    for path in sorted([*ROOT.glob("*.md"), *paths]):
        relative = path.relative_to(ROOT)
        name = relative.as_posix()
        if path.suffix in {".py", ".md"} and name not in EXCLUDED:
            if not name.startswith(EXCLUDED_FOLDERS):
                yield relative


def test_repository():
    paths = list(sources())
    assert len(paths) > 150
    problems = [
        problem for path in paths for problem in check(path, (ROOT / path).read_text("utf-8"))
    ]
    assert not problems, "\n".join(["see the tables in tests/language.py", *problems])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("class Company:\n    pass\n", ":1: 'Company' is a name of earlier versions; use Fit"),
        ("x = 1\npupil = x\n", ":2: 'pupil' is a name of earlier versions; use learner"),
        ('"""Uses a `Listener` for it."""\n', ":1: 'Listener' is a name of earlier versions"),
        ("def settle():\n    pass\n", ":1: 'settle' is a name of earlier versions; use prepare_"),
        ("def f(own):\n    return own\n", ":1: variable 'own' names no thing; use a noun"),
        ("from ipa_torch.turns import x\n", ":1: 'ipa_torch.turns' is a module of earlier"),
        ('"""Whether it works."""\n', ":1: the docstring opens with 'Whether'; name the thing"),
        ('def f():\n    """What f is."""\n', ":2: the docstring opens with 'What'"),
        ("optimiser = 1\n", ":1: 'optimiser' is British spelling"),
        ("def test_unlabelled_colours():\n    pass\n", ":1: 'colour' is British spelling"),
        ("# Layers are dequantised.\n", ":1: 'dequantised' is British spelling"),
        ("# A hook hears of it.\n", ":1: 'hears' is no term of the field; say: observe"),
        ('"""Fit.\n\nLearned in turns.\n"""\n', ":3: 'in turns' is no term of the field; say: mem"),
    ],
)
def test_planted_violation_in_code(text, problem):
    (found,) = [line for line in check(Path("ipa_core/x.py"), text) if problem in line]
    assert found.startswith("ipa_core/x.py:")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Use `ipa_hf.placing`.\n", ":1: 'ipa_hf.placing' is a module of earlier versions"),
        ("See\n`Projectors.table`.\n", ":2: 'Projectors' is a name of earlier versions; use Lay"),
        ("Normalised rows\n", ":1: 'Normalised' is British spelling"),
        ("The members agree.\n", ":1: 'members' is no term of the field; say: ranks"),
    ],
)
def test_planted_violation_in_documentation(text, problem):
    (found,) = [line for line in check(Path("docs/x.md"), text) if problem in line]
    assert found.startswith("docs/x.md:")


def test_module_named_by_an_activity():
    assert check(Path("integrations/ipa_torch/_fit/listening.py"), "") == [
        "integrations/ipa_torch/_fit/listening.py:1: module 'listening' is named by an activity; "
        "use a noun of the field"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "center = precise = promise = noise = raises = exercise = 1\n",
        '"""Return the learner that a collector observes."""\n',
        "kind = place = 1  # ordinary words as variables\n",
    ],
)
def test_terms_of_the_field_pass(text):
    assert check(Path("ipa_core/x.py"), text) == []


def test_fenced_code_is_no_prose():
    assert check(Path("docs/x.md"), "```python\nmembers = 1\n```\n") == []
