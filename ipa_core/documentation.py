"""Pages of the documentation in the installed package."""

from __future__ import annotations

from pathlib import Path


def page_path(page: str) -> str:
    """Return the path of a page of the documentation that the installed package has.

    In a checkout it is the path in the repository.
    """
    installed = Path(__file__).parent / page
    return str(installed) if Path(str(installed).partition("#")[0]).is_file() else page
