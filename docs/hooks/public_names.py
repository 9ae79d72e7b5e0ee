"""Tables of all public names with the first lines of their docstrings, generated in each build.

They replace the line ``<!-- public names -->`` of a page. The sources are parsed, not imported, so
that packages whose dependencies are not installed are listed, too.
"""

import re
from pathlib import Path
from typing import Any

from griffe import Alias, GriffeLoader, Module, Object

ROOT = Path(__file__).parents[2]
MARKER = "<!-- public names -->"
#: The modules that users import.
MODULES = (
    "ipa_core",
    "ipa_core.dask_backend",
    "ipa_core.plotting",
    "ipa_torch",
    "ipa_hf",
    "ipa_timm",
    "ipa_sklearn",
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker by one table for each public module."""
    return markdown.replace(MARKER, tables()) if MARKER in markdown else markdown


def tables() -> str:
    """Return the tables as Markdown."""
    return "\n\n".join(_table(module, lines) for module, lines in public_names().items())


def public_names() -> dict[str, dict[str, str]]:
    """Return for each public module its public names with the first lines of their docstrings."""
    loader = GriffeLoader(search_paths=[ROOT, ROOT / "integrations"])
    found = {}
    for path in MODULES:
        module = loader.load(path)
        loader.resolve_aliases()
        found[path] = {name: _first_line(module[name]) for name in _names(module)}
    return found


def _names(module: Module) -> list[str]:
    if module.exports is not None:
        return sorted((str(name) for name in module.exports), key=str.lower)
    functions = module.functions.items()
    return [name for name, member in functions if not (member.is_alias or name.startswith("_"))]


def _first_line(member: Object | Alias) -> str:
    if member.docstring is None:
        raise ValueError(f"expected a docstring of {member.path}, got none; write its first line")
    line = member.docstring.value.partition("\n\n")[0].replace("\n", " ")
    return re.sub(r":math:`(.+?)`", r"$\1$", line).replace("``", "`").replace("|", "\\|")


def _table(module: str, lines: dict[str, str]) -> str:
    rows = [f"| [`{name}`](#{module}.{name}) | {line} |" for name, line in lines.items()]
    return "\n".join([f"### {module}", "", "| name | meaning |", "|---|---|", *rows])
