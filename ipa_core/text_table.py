"""Text tables with aligned columns."""

from __future__ import annotations

from collections.abc import Container, Sequence


def align(rows: Sequence[Sequence[str]], left: Container[int] = ()) -> str:
    """Return lines of the rows with columns aligned: those in ``left`` to the left, others right.

    Examples
    --------
    >>> print(align([("layer", "rank"), ("q_proj", "8")], left={0}))
    layer   rank
    q_proj     8
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
