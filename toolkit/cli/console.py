"""What is printed: results to stdout, progress and trouble to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def result(text: str) -> None:
    """Print a line of the result as it is."""
    print(text)


def result_json(value: Any) -> None:
    """Print the result as JSON."""
    print(json.dumps(value, indent=2))


def progress(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def trouble(message: str, hint: str) -> None:
    """Print an error and what to do about it, in at most three lines."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"  {hint}", file=sys.stderr)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    status: str = "",
) -> None:
    """Print a table for people.

    Parameters
    ----------
    columns : sequence of str
        Headings.
    rows : iterable of sequences
        One sequence of cells a row.
    title : str
        Line above the table.
    status : str
        Heading of the column whose words (pass, warn, fail, skip) are coloured.
    """
    if not sys.stdout.isatty():
        # For grep: no colour, nothing folded; and Rich takes as long as all the rest of a check.
        lines = [[" ".join(str(cell).splitlines()) for cell in row] for row in (columns, *rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        if title:
            print(title)
        for line in lines:
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print("  ".join(padded).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        view.add_column(column, overflow="fold")
    for row in rows:
        cells = [Text(str(cell)) for cell in row]
        for column, cell in zip(columns, cells, strict=True):
            if column == status:
                cell.stylize(STYLES.get(cell.plain, ""))
        view.add_row(*cells)
    screen = Console(highlight=False)
    with screen.capture() as capture:
        screen.print(view)
    # Rich fills every line up to the width of the widest.
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))
