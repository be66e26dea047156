"""``toolkit doctor``."""

from __future__ import annotations

import dataclasses

import typer

from toolkit.cli import console, options


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("doctor")(doctor)


def doctor(json: options.Json = False) -> None:
    """Say whether this host can build and run images, what is missing, and how to get it."""
    from toolkit import doctor as physician

    report = physician.examine()
    if json:
        console.result_json(
            dataclasses.asdict(report)
            | {"settings": [setting._asdict() for setting in report.settings]}
            | {"able": report.able}
        )
    else:
        rows = [(f.status, f.id, f.seen) for f in report.findings]
        console.table(("status", "what", "seen"), rows, status="status")
        console.result("")
        settings = [(s.name, s.value or "-", s.source) for s in report.settings]
        console.table(("setting", "value", "from"), settings)
        console.result(f"\nsite: {report.site}")
        troubled = [f for f in report.findings if f.remedy]
        if troubled:
            console.result("")
        for finding in troubled:
            console.result(f"{finding.id}: {finding.remedy}")
        able = "can" if report.able else "can NOT"
        console.result(f"\nThis host {able} build and run images.")
    if not report.able:
        raise typer.Exit(1)
