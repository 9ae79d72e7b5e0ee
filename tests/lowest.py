"""Lowest versions that pyproject.toml admits, as constraints: python tests/lowest.py [EXTRA ...].

It runs without anything installed.
"""

import re
import sys
import tomllib
from pathlib import Path

#: The lowest version of torch of which the index has a build for CPUs; the minimum is not tested.
INSTEAD = {"torch": "2.13.0"}


def lowest(*extras: str) -> list[str]:
    """Return a line `name==version` for each requirement of the package and of some extras."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][x] for x in extras)]
    pins = {}
    for requirement in (line for lines in lists for line in lines):
        name, version = re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", requirement).groups()
        pins[name] = f"{name}=={INSTEAD.get(name, version)}"
    return sorted(pins.values())


if __name__ == "__main__":
    print("\n".join(lowest(*sys.argv[1:])))
