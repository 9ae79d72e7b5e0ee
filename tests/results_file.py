"""Tables of figures that tests measured, with versions, machine and date, for the docs."""

import os
from pathlib import Path

import pytest

from benchmarks import record

#: Packages whose versions are written with the figures.
PACKAGES = ["torch", "transformers", "peft"]


class ResultsFile:
    """Rows that tests add; written where ``IPA_RESULTS`` names a folder, as the make targets do."""

    def __init__(self, name: str, command: str, header: list[str]) -> None:
        self.name, self.command, self.header = name, command, header
        self.rows: dict[str, list[str]] = {}

    def add(self, *row: str) -> None:
        """Add a row; its first two cells identify it."""
        self.rows["/".join(row[:2])] = [*row]

    def write(self) -> None:
        """Write the table, unless no folder is named or no test added a row."""
        if not (folder := os.environ.get("IPA_RESULTS")) or not self.rows:
            return
        facts = record.circumstances(self.command, PACKAGES)
        machine = facts["machine"]
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        text = (
            f"`{self.command}`, {facts['date']}, {machine['cores']} cores of {machine['cpu']}, "
            f"load {machine['load_at_the_end']} at the end; {versions}.\n\n"
        )
        table = record.table(self.header, list(self.rows.values()))
        Path(folder, f"{self.name}.md").write_text(text + table + "\n", encoding="utf-8")


def results_fixture(table: ResultsFile):
    """Return a fixture of a table that is written at the end of the session."""

    @pytest.fixture(scope="session")
    def results():
        yield table
        table.write()

    return results
