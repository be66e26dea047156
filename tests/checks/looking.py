"""Ask a report for what it found."""

from __future__ import annotations

from pathlib import Path

from toolkit.checks import report
from toolkit.checks.findings import Finding


def look(root: Path, backend: str = "rocm", *, expect: int | None = None) -> report.Report:
    return report.check(backend, root=root, expect=expect)


def of(found: report.Report, id: str) -> list[Finding]:
    return [f for f in found.findings if f.id == id]


def status(found: report.Report, id: str) -> str:
    """Return the worst status of a finding; empty if it is not there."""
    return next((f.status for f in of(found, id)), "")


def seen(found: report.Report, id: str) -> str:
    return " / ".join(f"{f.subject} {f.seen}".strip() for f in of(found, id))


def bad(found: report.Report) -> set[str]:
    """Return the ids of what is not well."""
    return {f.id for f in found.findings if f.status in ("warn", "fail")}
